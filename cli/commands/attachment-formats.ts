// An attachment in the words of those who use it: a person, a client that takes a URI, QEMU, libvirt.
import type { AttachmentDocument } from '../admin-types.ts'

export type AttachmentFormat = 'text' | 'uri' | 'qemu' | 'libvirt'

/**
 * How long QEMU holds requests back while the daemon is away (seconds): longer than any restart, shorter than a guest's
 * patience with its disk.
 */
const reconnectDelaySeconds = 60

/** Id of the object with the client's certificates, in QEMU's formats. */
const tlsCredentialsId = 'atoll-tls'

/** What has to be known besides the attachment to use it in this format; null: nothing. */
export function attachmentNote(attachment: AttachmentDocument, format: AttachmentFormat): string | null {
  if (attachment.server === null || !attachment.server.tls) return null
  switch (format) {
    case 'qemu':
      return (
        `QEMU needs the client's certificates (ca-cert.pem, client-cert.pem, client-key.pem) from a folder DIR before it: ` +
        `-object tls-creds-x509,id=${tlsCredentialsId},endpoint=client,dir=DIR`
      )
    case 'libvirt':
      return `QEMU's configuration on the host names the folder of the client's certificates: nbd_tls_x509_cert_dir in /etc/libvirt/qemu.conf`
    case 'text':
    case 'uri':
      return null
    default:
      return format satisfies never
  }
}

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

/**
 * The argument of QEMU's `-blockdev`. Raw is said explicitly: content that a guest writes must never be probed. Discards pass
 * only where every layer says so, and without them a volume never gets smaller again.
 */
function qemuBlockdev(attachment: AttachmentDocument): object {
  return {
    driver: 'raw',
    'node-name': `atoll-${attachment.exportName.slice(0, 8)}`,
    'read-only': attachment.readOnly,
    discard: 'unmap',
    file: {
      driver: 'nbd',
      discard: 'unmap',
      ...qemuServer(attachment),
      export: attachment.exportName,
      'reconnect-delay': reconnectDelaySeconds,
    },
  }
}

function qemuServer({ server, socketPath }: AttachmentDocument): object {
  if (server === null) return { server: { type: 'unix', path: socketPath } }
  // The port is a string in QEMU's schema.
  const inet = { server: { type: 'inet', host: server.host, port: String(server.port) } }
  return server.tls ? { ...inet, 'tls-creds': tlsCredentialsId } : inet
}

function libvirtDisk(attachment: AttachmentDocument): string {
  return [
    `<disk type='network' device='disk'>`,
    `  <driver name='qemu' type='raw' discard='unmap'/>`,
    `  <source protocol='nbd' name='${escapeXml(attachment.exportName)}'${attachment.server?.tls === true ? ` tls='yes'` : ''}>`,
    attachment.server === null
      ? `    <host transport='unix' socket='${escapeXml(attachment.socketPath ?? '')}'/>`
      : `    <host name='${escapeXml(attachment.server.host)}' port='${attachment.server.port}'/>`,
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
