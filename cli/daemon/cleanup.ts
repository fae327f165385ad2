import type { Logger } from '@atoll/core'

/** Things to undo, the last first. A failure to undo one thing does not keep the others. */
export class Cleanup {
  private readonly steps: { readonly name: string; readonly undo: () => Promise<void> | void }[] = []
  private readonly log: Logger

  constructor(log: Logger) {
    this.log = log
  }

  add(name: string, undo: () => Promise<void> | void): void {
    this.steps.push({ name, undo })
  }

  /** Returns whether every step succeeded. */
  async run(): Promise<boolean> {
    let succeeded = true
    for (let step = this.steps.pop(); step !== undefined; step = this.steps.pop()) {
      try {
        await step.undo()
      } catch (error) {
        succeeded = false
        this.log.error({ err: error }, `closing the ${step.name} failed`)
      }
    }
    return succeeded
  }
}
