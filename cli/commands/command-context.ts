// What every command shares: the options that work everywhere, the daemon it talks to, and how it prints.
import type { Command } from 'commander'
import { AdminClient } from '../client/admin-client.ts'
import { resolveHome } from '../client/home.ts'

export interface GlobalOptions {
  readonly home?: string
  readonly project?: string
  readonly json?: boolean
}

export class CommandContext {
  readonly client: AdminClient
  /** The project whose names are meant; undefined is the daemon's default, `admin`. */
  readonly project: string | undefined
  readonly json: boolean

  constructor(options: GlobalOptions) {
    this.client = new AdminClient(resolveHome(options.home))
    this.project = options.project
    this.json = options.json === true
  }

  /** Prints the result: the document itself with `--json`, else the text for people (nothing for an empty one). */
  print(document: unknown, text: () => string): void {
    if (this.json) {
      process.stdout.write(`${JSON.stringify(document, null, 2)}\n`)
      return
    }
    const lines = text()
    if (lines !== '') process.stdout.write(`${lines}\n`)
  }
}

/** The context of a command that is being run: its own options and those given before it. */
export function contextOf(command: Command): CommandContext {
  return new CommandContext(command.optsWithGlobals<GlobalOptions>())
}

/** Adds the example that every `--help` ends with. */
export function withExample(command: Command, ...lines: string[]): Command {
  return command.addHelpText('after', `\nExample:\n${lines.map((line) => `  ${line}`).join('\n')}`)
}
