import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { hasPrograms } from '../cli/test-programs.ts'
import { runClient } from '../clients/run-client.ts'

/** What `make-guest.sh` and QEMU need on this machine; Debian's package tools make it a Debian. */
export const guestPrograms: readonly string[] = [
  'qemu-system-x86_64',
  'qemu-img',
  'apt-get',
  'dpkg-deb',
  'mke2fs',
  'sfdisk',
  'mformat',
  'syslinux',
  'flock',
]

/** What Debian's package lists are checked against. */
const debianKeyring = '/usr/share/keyrings/debian-archive-keyring.gpg'

export function canRunGuests(): boolean {
  return process.arch === 'x64' && hasPrograms(...guestPrograms) && existsSync(debianKeyring)
}

/** The cold making of a guest downloads about 90 MB and writes 200. */
export const makeGuestLimitMs = 600_000

export interface GuestDisk {
  /** A bootable disk: boot loader, kernel, and a root file system in its second partition. */
  readonly qcow2: string
  /** Where the root file system begins on it. */
  readonly rootOffsetBytes: number
}

/** The guest of this machine's Debian mirror, made if it is not in the cache. */
export async function guestDisk(): Promise<GuestDisk> {
  const folder = (await runClient('bash', join(import.meta.dirname, 'make-guest.sh'))).trimEnd()
  return { qcow2: join(folder, 'disk.qcow2'), rootOffsetBytes: 32 * 1024 * 1024 }
}
