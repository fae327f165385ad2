/**
 * Every error code of the project: what it means, what to do about it, and the HTTP status an API answers with.
 *
 * A code is stable: callers match it, scripts match it, and a retired code is never given to something else. A test
 * compares this list with the codes that the sources use, in both directions.
 */
export interface ErrorEntry {
  /** What happened, as a sentence. */
  readonly meaning: string
  /** What the user or the operator does about it. */
  readonly action: string
  /** Status of an HTTP answer that carries this code. */
  readonly httpStatus: number
  /** Whether the same call may succeed later without anything else being changed. */
  readonly retryable: boolean
}

const entry = (httpStatus: number, meaning: string, action: string, retryable = false): ErrorEntry => ({
  meaning,
  action,
  httpStatus,
  retryable,
})

export const errorCatalogue = {
  // What the caller typed.
  NAME_INVALID: entry(
    400,
    'A name has characters or a length that are not allowed.',
    'Use 1 to 255 characters without control characters, "/" or "@"; the message says what holds for containers and files.',
  ),
  METADATA_INVALID: entry(
    400,
    'Metadata of a container or a file is longer than the limits, or cannot be text.',
    'Read the message: it names the item and the limit.',
  ),
  ID_INVALID: entry(400, 'An id is not a UUID.', 'Pass the id as it is shown by the list commands.'),
  SIZE_INVALID: entry(
    400,
    'A size cannot be read, is out of range or is not a multiple of the required unit.',
    'Pass bytes, or a number with K, M, G, T or P; volumes are multiples of 4096 bytes up to 512 TiB.',
  ),
  ARGUMENT_INVALID: entry(
    400,
    'An argument is missing, of the wrong kind or out of range.',
    'Read the message: it names the argument, the value and the limit.',
  ),
  CONFIG_INVALID: entry(400, 'The configuration file or an option of the daemon is wrong.', 'Correct the named setting.'),
  NAME_AMBIGUOUS: entry(409, 'Several resources have this name.', 'Use one of the ids in the message.'),
  NAME_TAKEN: entry(409, 'There is already something with this name.', 'Choose another name, or delete or rename the other one.'),

  // What is not there.
  VOLUME_NOT_FOUND: entry(404, 'There is no such volume.', 'Look at `atoll volume list`.'),
  SNAPSHOT_NOT_FOUND: entry(404, 'There is no such snapshot.', 'Look at `atoll snapshot list VOLUME`.'),
  IMAGE_NOT_FOUND: entry(404, 'There is no such image.', 'Look at `atoll image list`.'),
  CONTAINER_NOT_FOUND: entry(404, 'There is no such container.', 'Look at `atoll file list`.'),
  FILE_NOT_FOUND: entry(404, 'There is no such file, or no such version of it.', 'Look at `atoll file list CONTAINER`.'),
  RESOURCE_NOT_FOUND: entry(404, 'There is no volume, snapshot, image or file with this id.', 'Look at the list commands.'),
  POOL_NOT_FOUND: entry(404, 'There is no such pool.', 'Look at `atoll pool list`.'),
  JOB_NOT_FOUND: entry(404, 'There is no such job.', 'Look at `atoll job list`.'),
  PROJECT_NOT_FOUND: entry(404, 'There is no such project.', 'Check the project that was named.'),

  // The state of a resource forbids it.
  VOLUME_IN_USE: entry(409, 'The volume is attached or in use by a job.', 'Detach it, or wait for the job.'),
  VOLUME_HAS_SNAPSHOTS: entry(409, 'The volume has snapshots.', 'Delete them first, or delete the volume with --with-snapshots.'),
  NOT_ATTACHED: entry(409, 'The volume is not attached.', 'Attach it first.'),
  ALREADY_OPEN: entry(409, 'The resource is open already.', 'Use the open device, or close it first.'),
  NOT_OPEN: entry(409, 'The resource is not open.', 'Open it first.'),
  RESOURCE_STATUS: entry(
    409,
    'The resource is not in a state in which this can be done.',
    'Wait for the job that works on it, or delete it.',
  ),
  SNAPSHOT_BUSY: entry(
    503,
    'Requests in flight did not finish before the deadline, so the snapshot was not taken.',
    'Try again; if it repeats, look at what the backend is waiting for.',
    true,
  ),
  SNAPSHOT_MISMATCH: entry(409, 'The snapshot does not belong to this volume.', 'Name a snapshot of the same volume.'),
  LEASE_LOST: entry(
    409,
    'The lease of the volume was taken over: this daemon must not write it any more.',
    'Look for another daemon on the same catalog, then attach again.',
  ),
  MOVE_RUNNING: entry(
    409,
    'A job is moving the volume into another pool, or draining the pool.',
    'Wait for the job that the message names, or cancel it with `atoll job cancel ID`.',
  ),
  MOVE_NEEDLESS: entry(409, 'Everything that is to be moved is in the target pool already.', 'Nothing has to be done.'),
  JOB_STATE: entry(409, 'The job is in a state in which this cannot be done.', 'Look at `atoll job show`.'),
  JOB_CANCELLED: entry(409, 'The job was cancelled.', 'Start it again if it is still wanted.'),

  // Shrinking, images, jobs and exports.
  SHRINK_NEEDS_FORCE: entry(
    409,
    'The new size is smaller than the volume: what lies beyond would be lost.',
    'Pass --force if that is wanted.',
  ),
  SNAPSHOT_IN_USE: entry(409, 'The snapshot is attached or in use by a job.', 'Detach it, or wait for the job.'),
  IMAGE_IN_USE: entry(409, 'The image is attached or in use by a job.', 'Detach it, or wait for the job.'),
  FILE_IN_USE: entry(409, 'The file is being read.', 'Wait until its readers are done.', true),
  CONTAINER_NOT_EMPTY: entry(409, 'The container has files, or versions of files.', 'Delete them first.'),
  FILE_STREAM_LOST: entry(
    400,
    'What was put into a file ended before all of it had come, so nothing was changed.',
    'Put the file again.',
  ),
  ETAG_MISMATCH: entry(
    412,
    'The content is not the one that was asked for by its MD5.',
    'Look at the file as it is now, and decide again.',
  ),
  RANGE_INVALID: entry(416, 'The range begins behind the end of the file.', 'Keep within the size of the file.'),
  IMAGE_SOURCE_INVALID: entry(
    400,
    'The source of an import cannot be opened or is not a regular file.',
    'Name a readable file with its absolute path.',
  ),
  IMAGE_SOURCE_CHANGED: entry(
    409,
    'The source of an import changed while it was read.',
    'Import it again when nothing writes it any more.',
  ),
  IMAGE_STREAM_LOST: entry(
    409,
    'The stream that an import read ended early, or the daemon was restarted meanwhile.',
    'Start the import again.',
  ),
  IMAGE_SOURCE_FORBIDDEN: entry(
    403,
    'The source of an import is at an address that images are not fetched from, or redirects to another host.',
    'Name a public source, or start the daemon with --allow-private-image-sources.',
  ),
  IMAGE_FETCH_FAILED: entry(
    502,
    'The source of an import could not be read over the network.',
    'Look at the source, then start again.',
  ),
  IMAGE_FORMAT_UNSUPPORTED: entry(415, 'The format of the image is not supported here.', 'Convert it to raw or qcow2 first.'),
  IMAGE_CORRUPT: entry(
    422,
    'The image is damaged, truncated or not of the format that was named.',
    'Look at it with `qemu-img check`, or fetch it again.',
  ),
  IMAGE_FEATURE_UNSUPPORTED: entry(
    415,
    'The image uses a feature of its format that is not supported.',
    'Convert it with `qemu-img convert` on a trusted machine first.',
  ),
  IMAGE_HAS_BACKING_FILE: entry(
    415,
    'The image refers to a backing file, which is never followed.',
    'Flatten it with `qemu-img convert` on a trusted machine first.',
  ),
  IMAGE_HAS_DATA_FILE: entry(
    415,
    'The image keeps its data in another file, which is never followed.',
    'Convert it with `qemu-img convert` on a trusted machine first.',
  ),
  IMAGE_ENCRYPTED: entry(415, 'The image is encrypted.', 'Decrypt it with `qemu-img convert` first, or import it as raw.'),
  IMAGE_CONVERT_FAILED: entry(422, 'qemu-img could not convert the image.', 'Look at the message of qemu-img.'),
  QEMU_IMG_MISSING: entry(503, 'qemu-img is not installed.', 'Install the Debian package qemu-utils.'),
  SANDBOX_UNAVAILABLE: entry(
    503,
    'qemu-img cannot be confined on this machine, so it is not run.',
    'Allow user namespaces, or run the daemon as root.',
  ),
  DESTINATION_INVALID: entry(
    400,
    'The destination of an export cannot be written.',
    'Name an absolute path in an existing directory.',
  ),
  DESTINATION_EXISTS: entry(
    409,
    'The destination of an export exists already.',
    'Choose another path, or overwrite it with --force.',
  ),
  EXPORT_GONE: entry(409, 'The export is being detached or opened again.', 'Connect again in a moment.', true),
  LIMIT_REACHED: entry(
    503,
    'As many connections or waiting requests of one kind are there as are kept.',
    'Try again when some of them are gone.',
    true,
  ),
  JOB_QUEUE_FULL: entry(503, 'Too many jobs wait already.', 'Wait until some of them are done.', true),
  COMPOSER_CLOSED: entry(503, 'The daemon is stopping.', 'Start it again.', true),

  // Pools.
  DRIVER_UNKNOWN: entry(400, 'There is no southbound driver of this name.', 'Use one of the drivers in the message.'),
  DRIVER_DUPLICATE: entry(
    500,
    'Two southbound drivers have the same name.',
    'This is a defect of the build: rename one of them in southbound/drivers.ts.',
  ),
  POOL_OPTION_INVALID: entry(
    400,
    'An option of the pool is unknown, missing or has a wrong value.',
    "Read the message, or the driver's README.",
  ),
  POOL_OWNED_BY_OTHER: entry(
    409,
    'The pool belongs to another catalog.',
    'Use the catalog that owns it. Delete the pool\'s record "owner" only if that catalog is gone for good.',
  ),
  POOL_LOCKED: entry(409, 'Another process has the pool open.', 'Stop the process that the message names.', true),
  POOL_NOT_EMPTY: entry(409, 'The pool still holds layers.', 'Delete or migrate what lies in it, then reclaim.'),
  POOL_CORRUPT: entry(
    500,
    'A record of the pool cannot be read.',
    'Restore the named record from a backup, or delete it if you are sure whose pool it is.',
  ),
  EXPORT_CORRUPT: entry(
    500,
    "A record of a pool's export is damaged.",
    'While the catalog is there the export is written anew; for `atoll pool import` bring the record back from a backup.',
  ),
  POOL_EXPORT_MISSING: entry(
    409,
    'The pool holds no export, so nothing can be brought back from it.',
    'Check that it is the right pool; without an export, restore a backup of the catalog.',
  ),
  POOL_IMPORT_CONFLICT: entry(
    409,
    'The pool cannot be imported beside what this home has already.',
    'Import it into a fresh home: `atoll serve --home DIR` with a new folder, then `atoll pool import`.',
  ),
  POOL_NOT_AHEAD: entry(
    409,
    'The export in the pool is not newer than the catalog, so there is nothing to accept.',
    'Look at `atoll pool show POOL`: the state of its export is `ahead` where there is.',
  ),
  POOL_CLOSED: entry(503, 'The pool is closed.', 'Start the daemon again, or open the pool.', true),
  POOL_UNAVAILABLE: entry(
    503,
    'The backend of the pool cannot be reached.',
    'Bring the backend back; the daemon tries again by itself.',
    true,
  ),
  POOL_ACCESS_DENIED: entry(
    503,
    'The backend of the pool does not know the user of the pool, or does not let it do what a pool needs.',
    'Read the message: it names the user and the command that gives it the right.',
  ),
  POOL_OVERCOMMITTED: entry(
    507,
    'The volumes of the pool would have more bytes together than its over-commit setting allows.',
    'Delete or shrink volumes, use another pool, or raise the limit with `atoll pool set POOL overcommit=RATIO`.',
  ),
  POOL_DRAINING: entry(
    409,
    'The pool is being emptied, so nothing new is made in it.',
    'Use another pool; or take it back with `atoll pool set POOL draining=no`, after the job that drains it was cancelled.',
  ),
  POOL_UNSUPPORTED: entry(400, "The pool's backend cannot do this.", 'Use a pool whose capabilities include it.'),
  STORE_LOCKED: entry(409, 'Another process holds the lock of the directory.', 'Stop the process that the message names.', true),
  NO_SPACE: entry(507, 'The backend is full.', 'Delete something and reclaim, or make the backend larger.', true),

  // Bytes.
  IO_ERROR: entry(503, 'The backend failed to read, write or sync.', 'Look at the system log and at the disk.', true),
  LAYER_MISSING: entry(500, 'The file of a layer is missing.', 'Bring the named file back (from a backup or another replica).'),
  LAYER_EXISTS: entry(409, 'A layer of this id exists already.', 'Run `atoll pool check`.'),
  LAYER_READ_ONLY: entry(409, 'A sealed layer cannot be written.', 'This is a defect: report it.'),
  JOURNAL_CORRUPT: entry(
    500,
    'A journal has bytes that were never written by a crash.',
    'Keep the named file; restore the volume from a snapshot or a backup.',
  ),
  JOURNAL_BROKEN: entry(
    503,
    'A journal could not be brought back to a known state after a failed write.',
    'Detach and attach the volume; it is replayed then.',
  ),
  CATALOG_BEHIND: entry(
    409,
    'The catalog is older than the journal of the volume.',
    'Restore the newer catalog; the volume stays closed until then.',
  ),
  PAGE_CORRUPT: entry(500, 'A page of a map is not what its parent says.', 'Restore the catalog from a backup.'),
  PAGE_MISSING: entry(500, 'A page of a map is missing.', 'Restore the catalog from a backup.'),
  PAGE_FILE_ERROR: entry(
    503,
    "The engine's local page file cannot be read or written.",
    'Make space in the home directory and restart.',
    true,
  ),
  DEVICE_POISONED: entry(
    503,
    'A sync of the device failed, so nothing more is accepted until every client is gone.',
    'Detach the clients; the device is opened again from its journal.',
  ),
  DEVICE_CLOSED: entry(503, 'The device is closed.', 'Attach the volume again.', true),

  // The engine: devices, connections, copies.
  DEVICE_BUSY: entry(
    503,
    'Requests in flight did not end before the deadline of a swap; nothing was changed.',
    'Try again; if it repeats, look at what the backend is waiting for.',
    true,
  ),
  READ_ONLY: entry(
    409,
    'The device is open for reading only.',
    'Attach it without --read-only; snapshots and images cannot be written.',
  ),
  OUT_OF_RANGE: entry(400, 'A request reaches past the end of the device.', 'Keep within the size of the device.'),
  LAYER_UNKNOWN: entry(
    500,
    'A map names a layer that the catalog does not list for the resource.',
    'Restore the catalog from a backup.',
  ),
  LAYER_SEALED: entry(409, 'A write came to a layer that is not active any more.', 'This is a defect: report it with the log.'),
  LAYER_IN_USE: entry(409, 'A prepared layer already has a journal.', 'This is a defect: report it with the log.'),
  CHECKPOINT_BUSY: entry(409, 'A checkpoint of the device is under way.', 'Try again when it has ended.', true),
  CHECKPOINT_ENDED: entry(
    500,
    'A checkpoint was asked for something after it was committed or aborted.',
    'This is a defect: report it.',
  ),
  CHECKPOINT_OVERDUE: entry(
    503,
    'Too many changes of the map wait to be written to the catalog.',
    'Make space on the disk of the home directory; writes go on then.',
    true,
  ),
  SWAP_TWICE: entry(400, 'A volume is named twice in one snapshot.', 'Name each volume once.'),
  SWAP_UNCOMMITTED: entry(409, 'The previous snapshot of the device is not committed yet.', 'Try again in a moment.', true),
  SWAP_NOT_CHECKPOINTED: entry(
    409,
    'A snapshot was reported as committed before its map was.',
    'This is a defect: report it with the log.',
  ),
  SHRINK_UNCOMMITTED: entry(
    409,
    'Space was to be freed for a shrink that was not committed.',
    'This is a defect: report it with the log.',
  ),
  VERIFY_FAILED: entry(
    500,
    'What was copied into a pool is not what the pool returns when it is read back. Nobody reads the copy.',
    'Look at the disks, the memory and the network of the machines involved, then start the copy again.',
    true,
  ),
  SOURCE_CHANGED: entry(
    409,
    'The source of a copy changed while it was read.',
    'Leave the file alone until the copy is done, then start again.',
  ),
  FILE_ERROR: entry(
    400,
    'A file of an import or export could not be opened, read or written.',
    'Look at the path, its permissions and the disk.',
  ),
  ADDRESS_IN_USE: entry(409, 'Another process listens on this address.', 'Stop it, or choose another address.'),
  CONNECTION_CLOSED: entry(503, 'The connection is closed.', 'Connect again.', true),
  CONNECTION_BUSY: entry(409, 'Another call of the connection is under way.', 'This is a defect: report it with the log.'),
  READ_TIMEOUT: entry(503, 'The peer sent nothing in time.', 'Look at the network and at the client.', true),
  TLS_CREDENTIALS_INVALID: entry(
    400,
    'A certificate or a key for TLS cannot be used.',
    'Read the message: it names the file. The README shows how to make the files.',
  ),
  TLS_HANDSHAKE_FAILED: entry(
    400,
    'A client and the daemon could not agree on TLS, or one did not trust the certificate of the other.',
    'Look at the reason in the message: a client needs a certificate of the authority in ca-cert.pem.',
  ),
  ENGINE_BUSY: entry(503, 'Too many jobs wait for the engine already.', 'Try again in a moment.', true),
  ENGINE_PANIC: entry(
    500,
    'The engine failed where it must not; what it was doing was given up.',
    'This is a defect: report it with the message and the log.',
  ),
  ENGINE_CLOSED: entry(503, 'The engine is closed.', 'Start the daemon again.', true),
  THREAD_LIMIT: entry(
    503,
    'The system could not start another thread.',
    'Raise the limit of threads (ulimit -u, TasksMax).',
    true,
  ),

  // The catalog and the home.
  CATALOG_CORRUPT: entry(500, 'The catalog is damaged or not a catalog.', 'Restore the named file from a backup.'),
  CATALOG_BACKUP_INVALID: entry(400, 'A file is no backup of a catalog, or it is damaged.', 'Use another backup.'),
  CATALOG_LOCKED: entry(503, 'Another process has the catalog locked.', 'Stop the other process.', true),
  CATALOG_HELD: entry(
    409,
    'Another daemon is active on the catalog, and this one stands by.',
    'Ask the daemon that the message names; when it ends, this one takes its place by itself.',
    true,
  ),
  TAKE_OVER_REFUSED: entry(
    409,
    'The volume is in a pool that cannot shut out the daemon that has it.',
    'Stop the daemon that the message names; nothing was taken over.',
  ),
  CATALOG_TAKEN_OVER: entry(
    409,
    'Another process has taken the catalog over: this one changes nothing any more, and ends.',
    'Use the daemon that the message names; start this one again to stand by.',
  ),
  CATALOG_CONSTRAINT: entry(
    409,
    'A change would break a rule of the catalog.',
    'This is usually a race: try again; report it if it repeats.',
  ),
  CATALOG_ERROR: entry(
    500,
    'The catalog could not be read or written.',
    'Look at the message and at the disk of the home directory.',
  ),
  CATALOG_BROKEN: entry(
    503,
    'The disk failed during a commit, so it is not known what reached it; writes are refused.',
    'Check the disk of the home directory, then restart the daemon.',
  ),
  CATALOG_CLOSED: entry(503, 'The catalog is closed.', 'Start the daemon again.', true),
  FORMAT_VERSION: entry(
    409,
    'Something durable was written by a newer version.',
    'Use that version or a later one; nothing was changed.',
  ),
  LISTEN_FAILED: entry(
    503,
    'An address or a socket cannot be listened on.',
    'Stop what listens there, or choose another address.',
  ),

  // The command line.
  USAGE: entry(400, 'A command was given arguments that cannot be meant.', 'Look at the --help of the command.'),
  DAEMON_NOT_RUNNING: entry(503, 'No daemon answers on the admin socket of the home.', 'Start one, or name its --home.', true),
  DAEMON_STOPPING: entry(503, 'The daemon is being stopped.', 'Try again when it runs again.', true),
  INTERRUPTED: entry(409, 'Waiting for a job was interrupted; the job goes on.', 'Look at `atoll job show`.'),
  JOB_PAUSED: entry(409, 'The job was paused while somebody waited for it.', 'Continue it with `atoll job resume`.'),
  NOT_FOUND: entry(404, 'There is nothing at this path of an HTTP interface.', 'Correct the path.'),

  // The home.
  HOME_LOCKED: entry(
    409,
    'Another daemon serves this home directory.',
    'Stop the process that the message names, or use another --home.',
  ),

  // The program itself.
  NATIVE_MISSING: entry(500, 'The native addon is not built for this platform.', 'Run `npm start`, which builds it.'),
  INTERNAL: entry(500, 'A defect of this program.', 'Report it with the message and the log.'),
} as const satisfies Record<string, ErrorEntry>

/** A code of the catalogue. */
export type ErrorCode = keyof typeof errorCatalogue

/** The entry of a code, or undefined if the catalogue does not have it. */
export function findErrorEntry(code: string): ErrorEntry | undefined {
  return Object.hasOwn(errorCatalogue, code) ? errorCatalogue[code as ErrorCode] : undefined
}
