/**
 * The job that converts a qcow2 file into an image. qemu-img reads the file and writes the image through exports of ours and
 * is confined (convert-sandbox.ts). A conversion cannot go on in the middle: after a pause or a restart it begins anew.
 */
import { tmpdir } from 'node:os'
import { AtollError, type JsonObject, type NewId } from '@atoll/core'
import type { ImportTarget } from '@atoll/mapper'
import type { Device, Engine } from '@atoll/native'
import { makeSandboxDirectory, nbdImageName, runQemuImg } from './convert-sandbox.ts'
import { ImageSource, type SourceIdentity } from './image-source.ts'
import type { ImportTargets } from './import-targets.ts'
import type { JobContext, JobKind } from './job-kind.ts'
import type { ServeTemporaryNbd } from './temporary-nbd.ts'
import type { SetTimer } from './timers.ts'

/** qemu-img must read the header in this time. */
const infoTimeoutMs = 30_000
/** A conversion that moves nothing for so long is ended. */
const stallTimeoutMs = 10 * 60_000

export interface Qcow2ImportParams extends JsonObject {
  source: SourceIdentity
  /** As our own inspection found it. */
  virtualSizeBytes: number
}

export interface Qcow2ImportOptions {
  targets: ImportTargets
  engine: Engine
  serveTemporaryNbd: ServeTemporaryNbd
  newId: NewId
  setTimer: SetTimer
}

export function qcow2ImportKind(options: Qcow2ImportOptions): JobKind {
  return {
    kind: 'image-import-qcow2',
    pausable: true,
    parallelMax: 2,
    run: (context) => convertQcow2(context, options),
    discard: async ({ subject }) => options.targets.abort(subject),
  }
}

async function convertQcow2(context: JobContext, options: Qcow2ImportOptions): Promise<JsonObject> {
  const { source: identity, virtualSizeBytes } = context.params as Qcow2ImportParams
  const result = { imageId: context.subject, sizeBytes: virtualSizeBytes }
  const target = await options.targets.get(context.subject)
  // The job was stopped between the image's last commit and its own.
  if (target === null) return result
  // qemu-img is told that the target is zero; after an interrupted attempt it must be made so.
  if (context.cursor === null) await context.save({ begun: true })
  else await target.device.writeZeroes(0, virtualSizeBytes)
  context.report(0, virtualSizeBytes)
  const source = await ImageSource.openAgain(identity)
  try {
    const sourceDevice = await options.engine.openFileDevice({ path: source.descriptorPath })
    try {
      await convertDevice(context, options, { sourceDevice, target, virtualSizeBytes, fileBytes: identity.sizeBytes })
    } finally {
      await sourceDevice.close()
    }
    await source.requireUnchanged()
  } finally {
    await source.close()
  }
  context.checkInterrupted()
  await options.targets.finish(context.subject)
  return result
}

interface Conversion {
  sourceDevice: Device
  target: ImportTarget
  virtualSizeBytes: number
  fileBytes: number
}

async function convertDevice(context: JobContext, options: Qcow2ImportOptions, conversion: Conversion): Promise<void> {
  const { sourceDevice, target, virtualSizeBytes } = conversion
  // Names that nobody can guess: other processes of the confined user might find the directory.
  const names = { source: options.newId(), target: options.newId() }
  const directory = await makeSandboxDirectory(tmpdir())
  try {
    const server = await options.serveTemporaryNbd(
      [
        { name: names.source, device: sourceDevice, readOnly: true },
        { name: names.target, device: target.device, readOnly: false },
      ],
      { dir: directory.path, ...(directory.groupId === null ? {} : { groupId: directory.groupId }) },
    )
    try {
      const sourceName = nbdImageName('qcow2', server.socketPath, names.source)
      const targetName = nbdImageName('raw', server.socketPath, names.target)
      const common = { workBytesMax: conversion.fileBytes + virtualSizeBytes, signal: context.signal, setTimer: options.setTimer }
      const info = await runQemuImg({
        ...common,
        arguments: ['info', '--output=json', sourceName],
        activity: () => 0,
        stallTimeoutMs: infoTimeoutMs,
      })
      requireAsInspected(info, virtualSizeBytes)
      await runQemuImg({
        ...common,
        arguments: ['convert', '-p', '-n', '--target-is-zero', '-W', '-O', 'raw', sourceName, targetName],
        activity: () => sourceDevice.stats().readBytes + target.device.stats().writeBytes,
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
function requireAsInspected(output: string, virtualSizeBytes: number): void {
  const refuse = (why: string): never => {
    throw new AtollError('IMAGE_CORRUPT', `qemu-img sees another image than our own inspection: ${why}`, {
      values: { format: 'qcow2' },
    })
  }
  let info: Record<string, unknown>
  try {
    info = JSON.parse(output) as Record<string, unknown>
  } catch {
    return refuse('its answer is no JSON')
  }
  if (info['format'] !== 'qcow2') refuse(`its format is ${String(info['format'])}`)
  if (info['virtual-size'] !== virtualSizeBytes) refuse(`its size is ${String(info['virtual-size'])}, not ${virtualSizeBytes}`)
  if (info['backing-filename'] !== undefined) refuse('it has a backing file')
  if (info['encrypted'] === true) refuse('it is encrypted')
  const specific = (info['format-specific'] as { data?: Record<string, unknown> } | undefined)?.data
  if (specific?.['data-file'] !== undefined) refuse('it has a data file')
}
