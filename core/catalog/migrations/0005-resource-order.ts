/** Resources by their age, so that a listing is read page by page however many there are. */
import type { Migration } from './index.ts'

export const orderResources: Migration = {
  name: '0005-resource-order',
  async up(tx) {
    const { schema } = tx
    await schema.createIndex('resources_by_age').on('resources').columns(['project_id', 'kind', 'created_at', 'id']).execute()
    await schema.createIndex('resources_of_volume').on('resources').columns(['volume_id', 'kind', 'created_at', 'id']).execute()
  },
}
