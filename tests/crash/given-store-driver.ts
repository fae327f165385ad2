/** A driver whose one pool lies in a store that the test made: the recorder's, or an image of it after a crash. */
import { AtollError } from '@atoll/core'
import type { Driver, PoolHandle } from '@atoll/southbound'
import type { Store } from '@atoll/native'

/** Whether records can be written: a pool's export is made of them. */
export interface RecordSwitch {
  areFailing: boolean
}

export function givenStoreDriver(given: Store, records: RecordSwitch = { areFailing: false }): Driver {
  const store = new Proxy(given, {
    get(target, key) {
      if (key === 'writeRecord' && records.areFailing) {
        return async () => {
          throw new AtollError('IO_ERROR', 'the test lets no record be written')
        }
      }
      const value: unknown = Reflect.get(target, key, target)
      return typeof value === 'function' ? (value.bind(target) as unknown) : value
    },
  })
  return {
    name: 'memory',
    summary: 'a store made by a test',
    canShutOut: false,
    parseOptions: (options) => ({ ...options }),
    async open(context): Promise<PoolHandle> {
      const capabilities = store.capabilities()
      return {
        driver: 'memory',
        poolId: context.poolId,
        capabilities: { ...capabilities, fence: 'lock', offloadDomain: null, sharedByNodes: false },
        store,
        createLayer: (id) => store.createLayer(id),
        removeLayer: (id) => store.removeLayer(id),
        listLayers: () => store.listLayers(),
        listLayerIds: () => store.listLayerIds(),
        layerExists: (id) => store.layerExists(id),
        usage: () => store.usage(),
        health: () => ({ observedAt: context.now(), answerMs: null, conditions: [] }),
        sealLayer: (id, seal) => store.sealLayer(id, seal.volumeId, seal.epoch, seal.finalLsn, seal.successor),
        punchExcept: (id, keepRuns) => store.punchExcept(id, keepRuns),
        releaseReserve: () => store.releaseReserve(),
        restoreReserve: () => store.restoreReserve(),
        setReserve: async () => {},
        check: async () => [],
        destroy: async () => {},
        close: async () => {},
      }
    },
    inspect: async () => ({ store, owner: null, close: async () => {} }),
  }
}

/** The same for several pools: the option `place` says which of the stores one lies in. */
export function givenStoresDriver(stores: readonly Store[]): Driver {
  const drivers = stores.map((store) => givenStoreDriver(store))
  const of = ({ options }: { readonly options: Readonly<Record<string, string>> }): Driver => {
    const driver = drivers[Number(options['place'])]
    if (driver === undefined) throw new Error(`there is no store ${options['place']}`)
    return driver
  }
  return {
    ...of({ options: { place: '0' } }),
    open: async (context) => await of(context).open(context),
    inspect: async (context) => await of(context).inspect(context),
  }
}
