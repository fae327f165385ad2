import { describeDriver } from '../driver-contract.ts'
import { memoryDriver } from './memory-driver.ts'

describeDriver('memory', async () => ({
  driver: memoryDriver,
  options: { capacity: '256M' },
  invalidOptions: [{ capacity: 'plenty' }, { capacity: '0' }, { capacity: '2P' }],
  cleanUp: async () => {},
}))
