/**
 * The job that writes an image (or a snapshot) to a raw file, holes kept.
 *
 * Rules:
 * - Bytes go to a new file beside the destination, which is placed when it is whole (image-destination.ts).
 * - The file is made with mode 0600, exclusively, and is written through its descriptor.
 * - What is exported is read-only, so a step that was interrupted can be done again.
 */
import { constants, open, type FileHandle } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { AtollError, type JsonObject, type ResourceRow } from '@atoll/core'
import { isPlaced, placeExport, unlinkIfPresent, type DestinationParams } from './image-destination.ts'
import { copyStepBytesDefault, stepsPerSave } from './import-raw.ts'
import type { JobContext, JobKind } from './job-kind.ts'
import type { OpenDevices } from './open-devices.ts'

interface ExportCursor extends JsonObject {
  offsetBytes: number
  /** Of the partial file: another one under its name is not ours. */
  inode: string
}

export interface ExportKindOptions {
  devices: OpenDevices
  /** The image or snapshot. @throws AtollError RESOURCE_NOT_FOUND */
  findResource: (id: string) => Promise<ResourceRow>
  copyStepBytes?: number
}

export function imageExportKind(options: ExportKindOptions): JobKind {
  return {
    kind: 'image-export',
    pausable: true,
    parallelMax: 2,
    run: (context) => exportImage(context, options),
    discard: async ({ jobId, params }) => unlinkIfPresent(partialPath((params as DestinationParams).path, jobId)),
  }
}

async function exportImage(context: JobContext, options: ExportKindOptions): Promise<JsonObject> {
  const params = context.params as DestinationParams
  const cursor = context.cursor as ExportCursor | null
  const resource = await options.findResource(context.subject)
  const sizeBytes = resource.size_bytes
  const copyStepBytes = options.copyStepBytes ?? copyStepBytesDefault
  const partial = partialPath(params.path, context.jobId)
  const result = { path: params.path, sizeBytes }
  if (cursor?.offsetBytes === sizeBytes && (await isPlaced(params.path, cursor.inode))) {
    // The daemon was stopped between the last step and the end of the job.
    await unlinkIfPresent(partial)
    return result
  }
  const hold = await options.devices.acquire(resource)
  try {
    const { handle, inode, startBytes } = await openPartial(partial, sizeBytes, cursor)
    try {
      let offsetBytes = startBytes
      let savedBytes = startBytes
      const save = async (): Promise<void> => {
        await handle.sync()
        await context.save({ offsetBytes, inode })
        savedBytes = offsetBytes
      }
      while (offsetBytes < sizeBytes) {
        if (context.signal.aborted && offsetBytes !== savedBytes) await save()
        context.checkInterrupted()
        const lengthBytes = Math.min(copyStepBytes, sizeBytes - offsetBytes)
        await hold.device.copyOut({ path: `/proc/self/fd/${handle.fd}`, offsetBytes, lengthBytes })
        offsetBytes += lengthBytes
        context.report(offsetBytes, sizeBytes)
        if (offsetBytes - savedBytes >= stepsPerSave * copyStepBytes) await save()
      }
      await save()
    } finally {
      await handle.close()
    }
    await placeExport(partial, params)
    return result
  } finally {
    await hold.release()
  }
}

/** The partial file: the one of the cursor, or a new one. */
async function openPartial(
  partial: string,
  sizeBytes: number,
  cursor: ExportCursor | null,
): Promise<{ handle: FileHandle; inode: string; startBytes: number }> {
  const flags = constants.O_RDWR | constants.O_NOFOLLOW
  const present = cursor === null ? null : await open(partial, flags).catch(() => null)
  if (present !== null) {
    const status = await present.stat({ bigint: true })
    if (status.isFile() && Number(status.size) === sizeBytes && String(status.ino) === cursor?.inode) {
      return { handle: present, inode: cursor.inode, startBytes: cursor.offsetBytes }
    }
    await present.close()
  }
  await unlinkIfPresent(partial)
  const handle = await open(partial, flags | constants.O_CREAT | constants.O_EXCL, 0o600).catch((error: unknown) => {
    throw new AtollError('DESTINATION_INVALID', `cannot write beside the destination: ${(error as Error).message}`, {
      values: { path: partial },
      cause: error,
    })
  })
  try {
    await handle.truncate(sizeBytes)
    const status = await handle.stat({ bigint: true })
    return { handle, inode: String(status.ino), startBytes: 0 }
  } catch (error) {
    await handle.close()
    throw error
  }
}

function partialPath(path: string, jobId: string): string {
  return join(dirname(path), `.atoll-export-${jobId}`)
}
