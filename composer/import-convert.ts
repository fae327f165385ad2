/**
 * The job that converts a file of a foreign format into an image. qemu-img is confined (convert-sandbox.ts); it writes the image
 * through an export of ours, and reads the file itself if it may, else through an export too. A conversion cannot go on in the
 * middle: after a pause or a restart it begins anew.
 */
import { tmpdir } from 'node:os'
import { AtollError, isAtollError, type JsonObject, type NewId } from '@atoll/core'
import type { ImportTarget } from '@atoll/mapper'
import type { Device, Engine } from '@atoll/native'
import {
  descriptorImageName,
  makeSandboxDirectory,
  mayReadInSandbox,
  nbdImageName,
  runQemuImg,
  type QemuDriver,
} from './convert-sandbox.ts'
import type { ForeignFormat, ImagePlan } from './image-inspect.ts'
import { ImageSource, type SourceIdentity } from './image-source.ts'
import type { ImportTargets } from './import-targets.ts'
import type { JobContext, JobKind } from './job-kind.ts'
import type { ServeTemporaryNbd } from './temporary-nbd.ts'
import type { SetTimer } from './timers.ts'

/** qemu-img must read the header in this time. */
const infoTimeoutMs = 30_000
/** A conversion that moves nothing for so long is ended. */
export const stallTimeoutMs = 10 * 60_000
/** Of the processor time's budget: a byte that is a hole costs so much less than one of data. */
const holeBytesPerDataByte = 256

export interface ConvertImportParams extends JsonObject {
  source: SourceIdentity
  format: ForeignFormat
  /** As our own inspection found it. */
  virtualSizeBytes: number
  allocatedBytes: number
}

export interface ConvertOptions {
  targets: ImportTargets
  engine: Engine
  serveTemporaryNbd: ServeTemporaryNbd
  newId: NewId
  setTimer: SetTimer
}

/** A plan that needs qemu-img. */
export type ConvertPlan = Extract<ImagePlan, { how: 'convert' }>

/** How QEMU calls the formats. */
const qemuDrivers: Readonly<Record<ForeignFormat, Exclude<QemuDriver, 'raw'>>> = {
  qcow2: 'qcow2',
  vmdk: 'vmdk',
  vdi: 'vdi',
  vhdx: 'vhdx',
  vhd: 'vpc',
}

export function convertImportKind(options: ConvertOptions): JobKind {
  return {
    kind: 'image-import-convert',
    pausable: true,
    parallelMax: 2,
    run: (context) => convertFile(context, options),
    discard: async ({ subject }) => options.targets.abort(subject),
  }
}

async function convertFile(context: JobContext, options: ConvertOptions): Promise<JsonObject> {
  const { source: identity, format, virtualSizeBytes, allocatedBytes } = context.params as ConvertImportParams
  const result = { imageId: context.subject, sizeBytes: virtualSizeBytes }
  const target = await options.targets.get(context.subject)
  // The job was stopped between the image's last commit and its own.
  if (target === null) return result
  // qemu-img is told that the target is zero; after an interrupted attempt it must be made so.
  if (context.cursor === null) await context.save({ begun: true })
  else await target.device.writeZeroes(0, virtualSizeBytes)
  const source = await ImageSource.openAgain(identity)
  try {
    await convertSource(context, options, { source, target, plan: { how: 'convert', format, virtualSizeBytes, allocatedBytes } })
  } finally {
    await source.close()
  }
  context.checkInterrupted()
  await options.targets.finish(context.subject)
  return result
}

/**
 * Converts an inspected source into a target that reads as zeros.
 * @throws AtollError IMAGE_CORRUPT, IMAGE_CONVERT_FAILED, IMAGE_SOURCE_CHANGED, QEMU_IMG_MISSING, SANDBOX_UNAVAILABLE
 * @throws JobInterrupted
 */
export async function convertSource(
  context: JobContext,
  options: Omit<ConvertOptions, 'targets'>,
  conversion: { source: ImageSource; target: ImportTarget; plan: ConvertPlan },
): Promise<void> {
  const { source, target, plan } = conversion
  context.report(0, plan.virtualSizeBytes)
  const common = { target, plan, fileBytes: source.sizeBytes }
  if (!(await convertDescriptor(context, options, { ...common, source }))) {
    const sourceDevice = await options.engine.openFileDevice({ path: source.descriptorPath })
    try {
      await convert(context, options, { ...common, sourceDevice })
    } finally {
      await sourceDevice.close()
    }
  }
  await source.requireUnchanged()
}

/**
 * Lets qemu-img read the file itself, which saves half of the copying, if its user may. False: that user may not, and nothing was
 * done.
 */
async function convertDescriptor(
  context: JobContext,
  options: Omit<ConvertOptions, 'targets'>,
  { source, ...conversion }: Omit<Conversion, 'sourceDevice' | 'descriptor'> & { source: ImageSource },
): Promise<boolean> {
  if (!mayReadInSandbox(await source.mode())) return false
  try {
    await convert(context, options, { ...conversion, descriptor: source.descriptor })
    return true
  } catch (error) {
    // The mode is not all that decides: there are access lists, and file systems that let only one user in.
    if (isAtollError(error, 'IMAGE_CONVERT_FAILED') && error.message.includes('Permission denied')) return false
    throw error
  }
}

interface Conversion {
  /** What qemu-img reads through an export of ours… */
  sourceDevice?: Device
  /** …or is given. */
  descriptor?: number
  target: ImportTarget
  plan: ConvertPlan
  fileBytes: number
}

async function convert(context: JobContext, options: Omit<ConvertOptions, 'targets'>, conversion: Conversion): Promise<void> {
  const { sourceDevice, descriptor, target, plan } = conversion
  const { virtualSizeBytes } = plan
  // Names that nobody can guess: other processes of the confined user might find the directory.
  const names = { source: options.newId(), target: options.newId() }
  const directory = await makeSandboxDirectory(tmpdir())
  try {
    const server = await options.serveTemporaryNbd(
      [
        ...(sourceDevice === undefined ? [] : [{ name: names.source, device: sourceDevice, readOnly: true }]),
        { name: names.target, device: target.device, readOnly: false },
      ],
      { dir: directory.path, ...(directory.groupId === null ? {} : { groupId: directory.groupId }) },
    )
    try {
      const driver = qemuDrivers[plan.format]
      const sourceName =
        descriptor === undefined ? nbdImageName(driver, server.socketPath, names.source) : descriptorImageName(driver)
      const targetName = nbdImageName('raw', server.socketPath, names.target)
      const common = {
        workBytesMax: conversion.fileBytes + plan.allocatedBytes + Math.ceil(virtualSizeBytes / holeBytesPerDataByte),
        signal: context.signal,
        setTimer: options.setTimer,
        ...(descriptor === undefined ? {} : { inputFile: { descriptor } }),
      }
      const info = await runQemuImg({
        ...common,
        arguments: ['info', '--output=json', sourceName],
        activity: () => 0,
        stallTimeoutMs: infoTimeoutMs,
      })
      requireAsInspected(info, plan)
      await runQemuImg({
        ...common,
        arguments: ['convert', '-p', '-n', '--target-is-zero', '-W', '-O', 'raw', sourceName, targetName],
        activity: () => (sourceDevice?.stats().readBytes ?? 0) + target.device.stats().writeBytes,
        stallTimeoutMs,
        onPercent: (percent) => context.report(Math.floor((virtualSizeBytes * percent) / 100), virtualSizeBytes),
      })
    } finally {
      await server.close()
    }
  } finally {
    await directory.remove()
  }
}

/** Two readers of one header must agree, or one of them was deceived. */
function requireAsInspected(output: string, { format, virtualSizeBytes }: ConvertPlan): void {
  const refuse = (why: string): never => {
    throw new AtollError('IMAGE_CORRUPT', `qemu-img sees another image than our own inspection: ${why}`, { values: { format } })
  }
  let info: Record<string, unknown>
  try {
    info = JSON.parse(output) as Record<string, unknown>
  } catch {
    return refuse('its answer is no JSON')
  }
  if (info['format'] !== qemuDrivers[format]) refuse(`its format is ${String(info['format'])}`)
  if (info['virtual-size'] !== virtualSizeBytes) refuse(`its size is ${String(info['virtual-size'])}, not ${virtualSizeBytes}`)
  if (info['backing-filename'] !== undefined) refuse('it has a backing file')
  if (info['encrypted'] === true) refuse('it is encrypted')
  const specific = (info['format-specific'] as { data?: Record<string, unknown> } | undefined)?.data
  if (specific?.['data-file'] !== undefined) refuse('it has a data file')
  const extents = specific?.['extents']
  if (Array.isArray(extents) && extents.length !== 1) refuse(`it has ${extents.length} extents`)
}
