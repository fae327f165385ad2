import { spawnSync } from 'node:child_process'
import { accessSync, constants } from 'node:fs'
import { delimiter, join } from 'node:path'
import { describe, it } from 'vitest'

/** A program that a test runs, and the Debian package it comes in. */
export interface RequiredTool {
  readonly command: string
  /** For a Python: the module that it must be able to import. */
  readonly pythonModule?: string
  readonly debianPackage: string
}

export const nbdkitTool: RequiredTool = { command: 'nbdkit', debianPackage: 'nbdkit' }
export const qemuNbdTool: RequiredTool = { command: 'qemu-nbd', debianPackage: 'qemu-utils' }
export const qemuImgTool: RequiredTool = { command: 'qemu-img', debianPackage: 'qemu-utils' }
export const qemuIoTool: RequiredTool = { command: 'qemu-io', debianPackage: 'qemu-utils' }
export const nbdinfoTool: RequiredTool = { command: 'nbdinfo', debianPackage: 'libnbd-bin' }
export const nbdcopyTool: RequiredTool = { command: 'nbdcopy', debianPackage: 'libnbd-bin' }
/** Makes certificates for tests of TLS. */
export const opensslTool: RequiredTool = { command: 'openssl', debianPackage: 'openssl' }
/** libnbd is a Debian package, so it is the system's Python that has it. */
export const pythonLibnbdTool: RequiredTool = {
  command: '/usr/bin/python3',
  pythonModule: 'nbd',
  debianPackage: 'python3-libnbd',
}

/**
 * A `describe` that is skipped, saying what to install, where a tool is missing. With ATOLL_TEST_REQUIRE=all it fails instead.
 */
export function describeWithTools(name: string, tools: readonly RequiredTool[], body: () => void): void {
  const missing = tools.filter((tool) => !isInstalled(tool))
  if (missing.length === 0) {
    describe(name, body)
    return
  }
  const reason = `missing ${missing.map((tool) => tool.command).join(', ')}: apt-get install ${[...new Set(missing.map((tool) => tool.debianPackage))].join(' ')}`
  if (process.env['ATOLL_TEST_REQUIRE'] === 'all') {
    describe(name, () => {
      it('has the tools it needs', () => {
        throw new Error(reason)
      })
    })
    return
  }
  describe.skip(`${name} [skipped: ${reason}]`, body)
}

function isInstalled(tool: RequiredTool): boolean {
  if (tool.pythonModule !== undefined) return spawnSync(tool.command, ['-c', `import ${tool.pythonModule}`]).status === 0
  return (process.env['PATH'] ?? '').split(delimiter).some((folder) => folder !== '' && isExecutable(join(folder, tool.command)))
}

function isExecutable(path: string): boolean {
  try {
    accessSync(path, constants.X_OK)
    return true
  } catch {
    return false
  }
}
