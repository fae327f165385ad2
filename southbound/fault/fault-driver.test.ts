import { Engine } from '@atoll/native'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { describeDriver, type DriverSubject } from '../driver-contract.ts'
import type { PoolHandle } from '../driver.ts'
import { memoryDriver } from '../memory/memory-driver.ts'
import { parseFaultPlan } from './fault-config.ts'
import { setFaults, withFaults } from './fault-driver.ts'

describeDriver('fault over memory', async (): Promise<DriverSubject> => ({
  driver: withFaults(memoryDriver),
  options: { capacity: '256M' },
  invalidOptions: [
    { faults: 'not json' },
    { faults: '{"rules":[{"operation":"explode"}]}' },
    { faults: '{"rules":[{"operation":"read","errno":"EPERHAPS"}]}' },
    { capacity: 'plenty' },
  ],
  cleanUp: async () => {},
}))

describe('the fault driver alone', () => {
  const layer = 'a0000000-0000-4000-8000-000000000001'
  const otherLayer = 'a0000000-0000-4000-8000-000000000002'
  let engine: Engine
  let pool: PoolHandle

  async function open(faults?: string): Promise<PoolHandle> {
    return withFaults(memoryDriver).open({
      engine,
      poolId: 'b0000000-0000-4000-8000-000000000001',
      options: faults === undefined ? {} : { faults },
      catalogId: 'ca000000-0000-4000-8000-000000000001',
      ownerText: 'pid 1',
      now: () => 0,
    })
  }

  beforeEach(async () => {
    engine = new Engine()
    pool = await open()
  })

  afterEach(async () => {
    await pool.close()
    await engine.close()
  })

  test('a rule hits the calls that it counts out, with its errno, and no others', async () => {
    setFaults(pool, { rules: [{ operation: 'create', skipCount: 1, applyCount: 1, errno: 'ENOSPC' }] })
    await pool.createLayer(layer)
    await expect(pool.createLayer(otherLayer)).rejects.toMatchObject({ code: 'NO_SPACE' })
    await pool.createLayer(otherLayer)
    expect(pool.store.injectedCount()).toBe(1)
  })

  test('a rule for one layer leaves the others alone', async () => {
    setFaults(pool, { rules: [{ operation: 'create', layer: otherLayer }] })
    await pool.createLayer(layer)
    await expect(pool.createLayer(otherLayer)).rejects.toMatchObject({ code: 'IO_ERROR' })
  })

  test('without rules nothing fails any more', async () => {
    setFaults(pool, { rules: [{ operation: 'create' }] })
    await expect(pool.createLayer(layer)).rejects.toMatchObject({ code: 'IO_ERROR' })
    setFaults(pool, {})
    await pool.createLayer(layer)
    expect((await pool.listLayers()).map(({ id }) => id)).toEqual([layer])
  })

  test('the same seed fails the same calls', async () => {
    const outcomes = async (seed: number): Promise<boolean[]> => {
      setFaults(pool, { seed, rules: [{ operation: 'create', probabilityOf256: 128 }] })
      const failed: boolean[] = []
      for (let index = 0; index < 32; index += 1) {
        const id = `a0000000-0000-4000-8000-0000000001${String(index).padStart(2, '0')}`
        failed.push(
          await pool.createLayer(id).then(
            () => false,
            () => true,
          ),
        )
      }
      setFaults(pool, {})
      for (const { id } of await pool.listLayers()) await pool.removeLayer(id)
      return failed
    }
    const first = await outcomes(42)
    expect(await outcomes(42)).toEqual(first)
    expect(new Set(first)).toEqual(new Set([true, false]))
  })

  test('a plan can come with the pool, so that a drill survives a restart', async () => {
    await pool.close()
    pool = await open('{"rules":[{"operation":"create","errno":"ENOSPC"}]}')
    await expect(pool.createLayer(layer)).rejects.toMatchObject({ code: 'NO_SPACE' })
  })

  test('a plan is checked and filled in', () => {
    expect(parseFaultPlan({ rules: [{ operation: 'sync' }] })).toEqual({
      seed: 1,
      rules: [
        {
          operation: 'sync',
          skipCount: 0,
          applyCount: Number.MAX_SAFE_INTEGER,
          probabilityOf256: 256,
          errno: 5,
          delayMs: 0,
          tear: false,
        },
      ],
    })
    expect(() => parseFaultPlan({ rules: [{ operation: 'sync', delayMs: -1 }] })).toThrow('rules.0.delayMs')
  })
})
