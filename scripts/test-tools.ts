// Programs of others that tests talk to: a missing one means skipped tests here, and a failure where everything must run.
import { spawnSync } from 'node:child_process'

export interface TestTool {
  /** What is looked for: a program on the PATH, or a Python module after `python3:`. */
  readonly name: string
  /** The Debian package that has it. */
  readonly debianPackage: string
  /** What is not tested without it. */
  readonly usedFor: string
}

export const testTools: readonly TestTool[] = [
  { name: 'qemu-img', debianPackage: 'qemu-utils', usedFor: 'import of qcow2, NBD with QEMU as the client' },
  { name: 'qemu-io', debianPackage: 'qemu-utils', usedFor: 'NBD with QEMU as the client, the README tour' },
  { name: 'nbdcopy', debianPackage: 'libnbd-bin', usedFor: 'NBD with libnbd as the client, the README tour' },
  { name: 'nbdinfo', debianPackage: 'libnbd-bin', usedFor: 'the list of exports as libnbd sees it' },
  { name: 'python3:nbd', debianPackage: 'python3-libnbd', usedFor: 'NBD requests that the command-line clients cannot send' },
  { name: 'openssl', debianPackage: 'openssl', usedFor: 'certificates for NBD over TLS' },
  { name: 'nbdkit', debianPackage: 'nbdkit', usedFor: 'our NBD client against a server that is not ours' },
  { name: 'fio', debianPackage: 'fio', usedFor: 'load in the crash tests' },
  { name: 'mke2fs', debianPackage: 'e2fsprogs', usedFor: 'disk images with a file system' },
  { name: 'setpriv', debianPackage: 'util-linux', usedFor: 'conversion of images as an unprivileged user' },
  { name: 'dpkg-deb', debianPackage: 'dpkg', usedFor: 'disk images made of Debian packages' },
  { name: 'qemu-system-x86_64', debianPackage: 'qemu-system-x86', usedFor: 'guests that boot from our volumes' },
  { name: 'syslinux', debianPackage: 'syslinux', usedFor: 'bootable disks for guests' },
  { name: 'mformat', debianPackage: 'mtools', usedFor: 'bootable disks for guests' },
  { name: 'sfdisk', debianPackage: 'fdisk', usedFor: 'bootable disks for guests' },
  { name: 'cc', debianPackage: 'gcc', usedFor: "the kernel's NBD client through a kill of the daemon" },
  { name: 'nbdfuse', debianPackage: 'libnbd-bin', usedFor: 'file system tools on an export' },
  { name: 'promtool', debianPackage: 'prometheus', usedFor: 'the text of /metrics' },
  { name: 'ceph-mon', debianPackage: 'ceph-mon', usedFor: 'pools on a real Ceph cluster' },
  { name: 'ceph-osd', debianPackage: 'ceph-osd', usedFor: 'pools on a real Ceph cluster' },
  { name: 'ceph-mgr', debianPackage: 'ceph-mgr', usedFor: 'what a Ceph cluster says about its space' },
  { name: 'ip', debianPackage: 'iproute2', usedFor: 'pools on a Ceph cluster whose network is cut' },
  { name: 'mkfs.xfs', debianPackage: 'xfsprogs', usedFor: 'pools on a file system whose files share blocks' },
  { name: 'mkfs.btrfs', debianPackage: 'btrfs-progs', usedFor: 'pools on a file system whose files share blocks' },
  { name: 'qemu-storage-daemon', debianPackage: 'qemu-system-common', usedFor: 'QEMU as a client that exports us again' },
]

function isInstalled(tool: TestTool): boolean {
  const [kind, module] = tool.name.split(':')
  const probe =
    kind === 'python3' && module !== undefined
      ? spawnSync('/usr/bin/python3', ['-c', `import ${module}`])
      : spawnSync('sh', ['-c', 'command -v -- "$1"', 'sh', tool.name], {
          // sbin holds mke2fs and is not on every user's PATH.
          env: { ...process.env, PATH: `${process.env['PATH'] ?? ''}:/usr/sbin:/sbin` },
        })
  return probe.status === 0
}

/** The tools of the table that this machine lacks. */
export function missingTools(): TestTool[] {
  return testTools.filter((tool) => !isInstalled(tool))
}
