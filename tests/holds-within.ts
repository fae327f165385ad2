import { setTimeout as wait } from 'node:timers/promises'

const pollMs = 20

/** Whether `condition` comes true within `limitMs`, asking again and again; for what says nothing when it happens. */
export async function holdsWithin(limitMs: number, condition: () => boolean | Promise<boolean>): Promise<boolean> {
  const deadline = performance.now() + limitMs
  while (!(await condition())) {
    if (performance.now() > deadline) return false
    await wait(pollMs)
  }
  return true
}
