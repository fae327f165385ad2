/** Whether a volume could be taken over by a daemon that stands by: asked before it takes anything over. */
import { openCatalog } from '@atoll/core'
import { requireTakeOverPossible, type TakeOverCheck } from '@atoll/mapper'
import { attachableResource, Resolver, type ProjectScope } from './resolve.ts'

/**
 * Looks at the catalog beside its owner, and at the pools of the volume (or snapshot, or image). Changes nothing.
 * @throws AtollError VOLUME_NOT_FOUND and the like, TAKE_OVER_REFUSED, POOL_UNAVAILABLE
 */
export async function checkTakeOver(
  { catalogPath, ...parts }: Omit<TakeOverCheck, 'catalog'> & { catalogPath: string },
  volume: string,
  scope: ProjectScope,
): Promise<void> {
  const catalog = await openCatalog(catalogPath, { readonly: true })
  try {
    const resolver = new Resolver(catalog)
    const row = await attachableResource(resolver, volume, scope)
    await requireTakeOverPossible({ catalog, ...parts }, row)
  } finally {
    await catalog.close()
  }
}
