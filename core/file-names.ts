/**
 * Names of containers and of the files in them, and their metadata, within the limits of Swift. A name is bytes of UTF-8:
 * 1 to 256 without "/" for a container, 1 to 1024 of any kind for a file. Only what cannot be stored as text is refused:
 * NUL, and surrogates without their other half.
 */
import { AtollError } from './errors.ts'

export const containerNameBytesMax = 256
export const fileNameBytesMax = 1024
export const metadataItemsMax = 90
export const metadataKeyBytesMax = 128
export const metadataValueBytesMax = 256
/** Keys and values together. */
export const metadataBytesMax = 4096
export const contentTypeBytesMax = 255
export const contentTypeDefault = 'application/octet-stream'

/** Bytes of a text as UTF-8. */
function utf8Bytes(text: string): number {
  return Buffer.byteLength(text, 'utf8')
}

/** Why a text cannot be kept as UTF-8; null: it can. */
function notStorable(text: string): string | null {
  if (text.includes('\0')) return 'contains a NUL'
  return text.isWellFormed() ? null : 'is not valid Unicode'
}

/** @throws AtollError NAME_INVALID */
export function checkContainerName(name: string): void {
  checkNameOf('container', name, containerNameBytesMax)
  if (name.includes('/')) throw nameInvalid('container', name, 'contains "/", which separates a container from its files')
}

/** The part behind the container: "/" is a character like any other. @throws AtollError NAME_INVALID */
export function checkFileName(name: string): void {
  checkNameOf('file', name, fileNameBytesMax)
}

function checkNameOf(kind: 'container' | 'file', name: string, bytesMax: number): void {
  const bytes = utf8Bytes(name)
  if (bytes === 0) throw nameInvalid(kind, name, `is empty: it has 1 to ${bytesMax} bytes of UTF-8`)
  if (bytes > bytesMax) throw nameInvalid(kind, name, `has ${bytes} bytes of UTF-8: at most ${bytesMax} are allowed`)
  const why = notStorable(name)
  if (why !== null) throw nameInvalid(kind, name, why)
}

function nameInvalid(kind: 'container' | 'file', name: string, why: string): AtollError {
  const shown = name.length > 64 ? `${name.slice(0, 64)}…` : name
  return new AtollError('NAME_INVALID', `${kind} name ${JSON.stringify(shown)} ${why}`, { values: { kind, name: shown } })
}

/**
 * The two parts of CONTAINER/NAME; the first "/" parts them. They are not checked as new names are.
 * @throws AtollError NAME_INVALID
 */
export function parseFilePath(text: string): { container: string; name: string } {
  const separator = text.indexOf('/')
  if (separator > 0 && separator < text.length - 1) {
    return { container: text.slice(0, separator), name: text.slice(separator + 1) }
  }
  throw new AtollError('NAME_INVALID', `${JSON.stringify(text)} is not the name of a file: CONTAINER/NAME is wanted`, {
    values: { kind: 'file', name: text },
  })
}

/** @throws AtollError METADATA_INVALID */
export function checkMetadata(metadata: Readonly<Record<string, string>>): void {
  const items = Object.entries(metadata)
  const refuse = (why: string): never => {
    throw new AtollError('METADATA_INVALID', `metadata ${why}`)
  }
  if (items.length > metadataItemsMax) refuse(`has ${items.length} items: at most ${metadataItemsMax} are allowed`)
  let totalBytes = 0
  for (const [key, value] of items) {
    const keyBytes = utf8Bytes(key)
    const valueBytes = utf8Bytes(value)
    totalBytes += keyBytes + valueBytes
    const shown = JSON.stringify(key.slice(0, metadataKeyBytesMax))
    if (keyBytes === 0) refuse('has an item without a name')
    if (keyBytes > metadataKeyBytesMax) {
      refuse(`name ${shown} has ${keyBytes} bytes of UTF-8: at most ${metadataKeyBytesMax} are allowed`)
    }
    if (valueBytes > metadataValueBytesMax) {
      refuse(`item ${shown} has ${valueBytes} bytes of UTF-8: at most ${metadataValueBytesMax} are allowed`)
    }
    const why = notStorable(key) ?? notStorable(value)
    if (why !== null) refuse(`item ${shown} ${why}`)
  }
  if (totalBytes > metadataBytesMax) refuse(`has ${totalBytes} bytes in all: at most ${metadataBytesMax} are allowed`)
}

/** A media type, which is kept as it is given: printable ASCII. @throws AtollError METADATA_INVALID */
export function checkContentType(contentType: string): void {
  if (/^[ -~]+$/.test(contentType) && contentType.length <= contentTypeBytesMax) return
  throw new AtollError(
    'METADATA_INVALID',
    `content type ${JSON.stringify(contentType.slice(0, 64))} is not 1 to ${contentTypeBytesMax} printable ASCII characters`,
  )
}
