import type { AttachmentView, Page } from '@atoll/composer'
import type { AttachmentDocument, Document, PageDocument } from '../../admin-types.ts'
import { nbdTcpUrl } from '../nbd-tcp-address.ts'
import type { AdminContext } from './admin-context.ts'

/** Where clients of an attachment come in. */
export type AttachmentDoors = Pick<AdminContext, 'endpoints' | 'nbdTcp'>

/** A view of the composer as it goes out: times become ISO 8601 text. One that has attachments needs `resourceDocument`. */
export function toDocument<View extends object>(view: View & { attachments?: never }): Document<View> {
  return withTimes(view)
}

/** A view of a volume, a snapshot or an image as it goes out. */
export function resourceDocument<View extends { attachments: AttachmentView[] }>(
  view: View,
  doors: AttachmentDoors,
): Document<View> {
  return { ...withTimes(view), attachments: view.attachments.map((attachment) => attachmentDocument(attachment, doors)) }
}

/** A page of such views. */
export function resourcePageDocument<View extends { attachments: AttachmentView[] }>(
  page: Page<View>,
  doors: AttachmentDoors,
): PageDocument<Document<View>> {
  return { entries: page.entries.map((view) => resourceDocument(view, doors)), next: page.next }
}

function withTimes<View extends object>(view: View): Document<View> {
  return Object.fromEntries(
    Object.entries(view).map(([name, value]: [string, unknown]) =>
      (name === 'createdAt' || name === 'updatedAt') && typeof value === 'number'
        ? [name, new Date(value).toISOString()]
        : [name, value],
    ),
  ) as Document<View>
}

/** An attachment with the door that its clients should use: the unix socket where there is one, else TCP. */
export function attachmentDocument(view: AttachmentView, { endpoints, nbdTcp }: AttachmentDoors): AttachmentDocument {
  const document = { ...view, createdAt: new Date(view.createdAt).toISOString(), server: null }
  if (endpoints.nbdSocket !== null || nbdTcp === null) return document
  const uri = `${nbdTcpUrl(nbdTcp)}/${encodeURIComponent(view.exportName)}`
  return { ...document, socketPath: null, server: nbdTcp, uri }
}
