import { X509Certificate } from 'node:crypto'

/** Longest name in a log (characters). */
const nameLengthMax = 64

/** Whom a certificate (DER) names, for logs: its common name, else its whole subject. Nothing is decided by it. */
export function certificateName(der: Uint8Array): string {
  let subject: string
  try {
    subject = new X509Certificate(der).subject ?? ''
  } catch {
    return 'a certificate that cannot be read'
  }
  const name = /^CN=(.*)$/m.exec(subject)?.[1] ?? subject
  // Whoever asked for the certificate chose the name: no line breaks and nothing else that moves a terminal.
  const printable = name.replaceAll(/\p{C}+/gu, ' ').trim()
  return printable.length > nameLengthMax ? `${printable.slice(0, nameLengthMax)}…` : printable
}
