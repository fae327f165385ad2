// An attachment in the words of those who use it: a person, a client that takes a URI, QEMU, libvirt.
import type { AttachmentDocument } from '../admin-types.ts'

export type AttachmentFormat = 'text' | 'uri' | 'qemu' | 'libvirt'

/**
 * How long QEMU holds requests back while the daemon is away (seconds): longer than any restart, shorter than a guest's
 * patience with its disk.
 */
const reconnectDelaySeconds = 60

/** The attachment in one of the formats; a single line for all but libvirt. */
export function attachmentText(attachment: AttachmentDocument, format: AttachmentFormat): string {
  switch (format) {
    case 'text': {
      const options = [attachment.readOnly ? ['read-only'] : [], attachment.shared ? ['shared'] : []].flat()
      return [attachment.uri, ...options].join('  ')
    }
    case 'uri':
      return attachment.uri
    case 'qemu':
      return JSON.stringify(qemuBlockdev(attachment))
    case 'libvirt':
      return libvirtDisk(attachment)
    default:
      return format satisfies never
  }
}

/** The argument of QEMU's `-blockdev`. Raw is said explicitly: content that a guest writes must never be probed. */
function qemuBlockdev(attachment: AttachmentDocument): object {
  return {
    driver: 'raw',
    'node-name': `atoll-${attachment.exportName.slice(0, 8)}`,
    'read-only': attachment.readOnly,
    file: {
      driver: 'nbd',
      server: { type: 'unix', path: attachment.socketPath },
      export: attachment.exportName,
      'reconnect-delay': reconnectDelaySeconds,
    },
  }
}

function libvirtDisk(attachment: AttachmentDocument): string {
  return [
    `<disk type='network' device='disk'>`,
    `  <driver name='qemu' type='raw'/>`,
    `  <source protocol='nbd' name='${escapeXml(attachment.exportName)}'>`,
    `    <host transport='unix' socket='${escapeXml(attachment.socketPath)}'/>`,
    `    <reconnect delay='${reconnectDelaySeconds}'/>`,
    `  </source>`,
    `  <target dev='vda' bus='virtio'/>`,
    ...(attachment.readOnly ? [`  <readonly/>`] : []),
    ...(attachment.shared ? [`  <shareable/>`] : []),
    `</disk>`,
  ].join('\n')
}

const xmlEscapes: Readonly<Record<string, string>> = { '&': '&amp;', '<': '&lt;', '>': '&gt;', "'": '&apos;', '"': '&quot;' }

function escapeXml(text: string): string {
  return text.replaceAll(/[&<>'"]/g, (character) => xmlEscapes[character] ?? character)
}
