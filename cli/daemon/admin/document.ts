import type { AttachmentView } from '@atoll/composer'
import type { AttachmentDocument, Document } from '../../admin-types.ts'

/** A view of the composer as it goes out: times become ISO 8601 text, also those of attachments in it. */
export function toDocument<View extends object>(view: View): Document<View> {
  return Object.fromEntries(
    Object.entries(view).map(([name, value]: [string, unknown]) => {
      if ((name === 'createdAt' || name === 'updatedAt') && typeof value === 'number')
        return [name, new Date(value).toISOString()]
      if (name === 'attachments') return [name, (value as AttachmentView[]).map(attachmentDocument)]
      return [name, value]
    }),
  ) as Document<View>
}

export function attachmentDocument(view: AttachmentView): AttachmentDocument {
  return { ...view, createdAt: new Date(view.createdAt).toISOString() }
}
