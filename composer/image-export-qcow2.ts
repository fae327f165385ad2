/**
 * The job that writes an image (or a snapshot) to a qcow2 file. qemu-img, confined, reads it through an export of ours; the file
 * is the one thing that it may write, handed over as a descriptor.
 *
 * Rules:
 * - The file lies in a folder of our own beside the destination, which nobody else may enter, because as root it belongs to
 *   the confined user as long as qemu-img runs. It is placed when it is whole and durable (image-destination.ts).
 * - A conversion cannot go on in the middle: after a pause or a restart it begins anew.
 */
import { constants, mkdir, open, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { AtollError, type JsonObject, type NewId, type ResourceRow } from '@atoll/core'
import type { Device } from '@atoll/native'
import {
  descriptorPath,
  makeSandboxDirectory,
  nbdImageName,
  runQemuImg,
  sandboxGroupId,
  sandboxUserId,
} from './convert-sandbox.ts'
import { isPlaced, placeExport, type DestinationParams } from './image-destination.ts'
import { stallTimeoutMs } from './import-convert.ts'
import type { JobContext, JobKind } from './job-kind.ts'
import type { OpenDevices } from './open-devices.ts'
import type { ServeTemporaryNbd } from './temporary-nbd.ts'
import type { SetTimer } from './timers.ts'

/** Tables and partly filled clusters on top of the data: of the size of the disk, and at least. */
const overheadFraction = 1 / 64
const overheadBytesMin = 64 * 2 ** 20

export interface Qcow2ExportParams extends DestinationParams {
  compress: boolean
}

export interface Qcow2ExportOptions {
  devices: OpenDevices
  /** The image or snapshot. @throws AtollError RESOURCE_NOT_FOUND */
  findResource: (id: string) => Promise<ResourceRow>
  serveTemporaryNbd: ServeTemporaryNbd
  newId: NewId
  setTimer: SetTimer
}

export function qcow2ExportKind(options: Qcow2ExportOptions): JobKind {
  return {
    kind: 'image-export-qcow2',
    pausable: true,
    parallelMax: 2,
    run: (context) => exportQcow2(context, options),
    discard: async ({ jobId, params }) => removeFolder((params as Qcow2ExportParams).path, jobId),
  }
}

async function exportQcow2(context: JobContext, options: Qcow2ExportOptions): Promise<JsonObject> {
  const params = context.params as Qcow2ExportParams
  const resource = await options.findResource(context.subject)
  const result = { path: params.path, sizeBytes: resource.size_bytes }
  const inode = context.cursor?.['inode']
  if (typeof inode === 'string' && (await isPlaced(params.path, inode))) {
    await removeFolder(params.path, context.jobId)
    return result
  }
  await removeFolder(params.path, context.jobId)
  const partial = join(folderOf(params.path, context.jobId), 'image.qcow2')
  const handle = await openPartial(partial)
  const hold = await options.devices.acquire(resource).catch(async (error: unknown) => {
    await handle.close()
    throw error
  })
  try {
    context.report(0, resource.size_bytes)
    const isRoot = process.geteuid?.() === 0
    if (isRoot) await handle.chown(sandboxUserId, sandboxGroupId)
    await convert(context, options, { device: hold.device, sizeBytes: resource.size_bytes, descriptor: handle.fd })
    if (isRoot) await handle.chown(process.geteuid?.() ?? 0, process.getegid?.() ?? 0)
    await handle.sync()
    const { ino } = await handle.stat({ bigint: true })
    await context.save({ inode: String(ino) })
  } finally {
    await handle.close()
    await hold.release()
  }
  context.checkInterrupted()
  await placeExport(partial, params)
  await removeFolder(params.path, context.jobId)
  return result
}

async function openPartial(partial: string): Promise<Awaited<ReturnType<typeof open>>> {
  try {
    await mkdir(dirname(partial), { mode: 0o700 })
    return await open(partial, constants.O_RDWR | constants.O_CREAT | constants.O_EXCL | constants.O_NOFOLLOW, 0o600)
  } catch (error) {
    throw new AtollError('DESTINATION_INVALID', `cannot write beside the destination: ${(error as Error).message}`, {
      values: { path: partial },
      cause: error,
    })
  }
}

async function convert(
  context: JobContext,
  options: Qcow2ExportOptions,
  { device, sizeBytes, descriptor }: { device: Device; sizeBytes: number; descriptor: number },
): Promise<void> {
  const { compress } = context.params as Qcow2ExportParams
  const name = options.newId()
  const directory = await makeSandboxDirectory(tmpdir())
  try {
    const server = await options.serveTemporaryNbd([{ name, device, readOnly: true }], {
      dir: directory.path,
      ...(directory.groupId === null ? {} : { groupId: directory.groupId }),
    })
    try {
      const source = nbdImageName('raw', server.socketPath, name)
      await runQemuImg({
        arguments: ['convert', '-p', '-O', 'qcow2', ...(compress ? ['-c'] : ['-W']), source, descriptorPath],
        // Compressing costs more than reading and writing.
        workBytesMax: sizeBytes * (compress ? 8 : 2),
        outputFile: { descriptor, sizeBytesMax: Math.ceil(sizeBytes * (1 + overheadFraction)) + overheadBytesMin },
        activity: () => device.stats().readBytes,
        stallTimeoutMs,
        signal: context.signal,
        setTimer: options.setTimer,
        onPercent: (percent) => context.report(Math.floor((sizeBytes * percent) / 100), sizeBytes),
      })
    } finally {
      await server.close()
    }
  } finally {
    await directory.remove()
  }
}

function folderOf(path: string, jobId: string): string {
  return join(dirname(path), `.atoll-export-${jobId}`)
}

async function removeFolder(path: string, jobId: string): Promise<void> {
  await rm(folderOf(path, jobId), { recursive: true, force: true })
}
