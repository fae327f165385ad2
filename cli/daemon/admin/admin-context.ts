import type { Clock } from '@atoll/core'
import type { Composer } from '@atoll/composer'
import type { Engine } from '@atoll/native'
import type { Endpoints } from '../endpoints.ts'
import type { NbdTcpServer } from '../nbd-tcp-address.ts'
import type { Ownership } from '../ownership.ts'

/** What the routes of the admin API work with. */
export interface AdminContext {
  /** Whatever is called of it throws CATALOG_HELD while the daemon stands by. */
  readonly composer: Composer
  readonly ownership: Pick<Ownership, 'becomeActive' | 'holder' | 'parts' | 'takeOver'>
  readonly catalogPath: string
  readonly engine: Engine
  readonly clock: Clock
  readonly endpoints: Endpoints
  /** The text of all metrics, those of single volumes included. */
  readonly metrics: () => Promise<string>
  /** NBD over TCP; null is off. */
  readonly nbdTcp: NbdTcpServer | null
  /** By `clock.monotonicMs`. */
  readonly startedAtMs: number
  /** Whether the daemon is being stopped: what waits for something must let go. */
  readonly stopping: AbortSignal
}
