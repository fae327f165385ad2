import { expect, test } from 'vitest'
import type { AdminClient, Query } from './admin-client.ts'
import { allPages } from './all-pages.ts'

test('a listing is asked for page by page until there is no more', async () => {
  const asked: Query[] = []
  const pages: Record<string, unknown> = {
    '': { entries: [1, 2], next: 'a' },
    a: { entries: [], next: 'b' },
    b: { entries: [3], next: null },
  }
  const client = {
    get: async (path: string, query: Query) => {
      expect(path).toBe('/v1/things')
      asked.push(query)
      return pages[String(query['marker'] ?? '')]
    },
  }
  expect(await allPages(client as unknown as AdminClient, '/v1/things', { project: 'p' })).toEqual([1, 2, 3])
  expect(asked.map(({ marker }) => marker)).toEqual([undefined, 'a', 'b'])
  expect(asked.every(({ project, limit }) => project === 'p' && Number(limit) > 0)).toBe(true)
})
