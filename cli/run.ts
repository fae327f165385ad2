// `atoll`: reads the command line, loads the one command it names, and turns failures into a message and an exit code.
import { Command, CommanderError } from 'commander'
import { CliError } from './client/cli-error.ts'
import { commandGroups } from './commands/groups.ts'
import { version } from './version.ts'

const optionsWithValue = new Set(['--home', '--project'])

/** The first word that is not an option: the group, whose module is the only one to be loaded. */
function groupName(args: readonly string[]): string | undefined {
  for (let index = 0; index < args.length; index += 1) {
    const argument = args[index] ?? ''
    if (optionsWithValue.has(argument)) index += 1
    else if (!argument.startsWith('-')) return argument
  }
  return undefined
}

async function buildProgram(args: readonly string[]): Promise<Command> {
  const program = new Command('atoll')
  program
    .description('Files, images, volumes and snapshots over one pool of copy-on-write data.')
    .option('--home <dir>', 'home of the daemon (default: $ATOLL_HOME, else .atoll in the checkout)')
    .option('--project <project>', 'name or id of the project (default: admin)')
    .option('--json', 'print one JSON document')
    .configureHelp({ showGlobalOptions: true })
    .exitOverride()
  // `atoll help volume` needs the commands of the group as well.
  const words = args.filter((word) => word !== 'help')
  const named = groupName(words)
  // A command may have a --version of its own (of a file).
  if (named === undefined) program.version(version)
  for (const group of commandGroups) {
    const command = program.command(group.name).description(group.summary).copyInheritedSettings(program)
    if (group.name === named) (await group.load()).register(command)
  }
  return program
}

function exitCodeOf(error: unknown): number {
  if (error instanceof CommanderError) {
    // Commander has printed its message; help that was asked for and the version are no failure.
    return error.code === 'commander.helpDisplayed' || error.code === 'commander.version' || error.exitCode === 0 ? 0 : 2
  }
  if (error instanceof CliError) {
    process.stderr.write(`atoll: ${error.code}: ${error.message}\n`)
    return error.exitCode
  }
  // An error of the daemon's own process (serve) carries a code as well; anything else is a defect and shows its stack.
  const { code, message, stack } = error as { code?: unknown; message?: string; stack?: string }
  process.stderr.write(typeof code === 'string' ? `atoll: ${code}: ${message}\n` : `atoll: INTERNAL: ${stack ?? String(error)}\n`)
  return 1
}

/** Runs the command that the words name; what fails is told, and is the exit code of the process. */
export async function run(args: readonly string[]): Promise<void> {
  // A reader that has seen enough (`atoll volume list | head -1`) is no failure.
  process.stdout.on('error', (error: NodeJS.ErrnoException) => {
    if (error.code === 'EPIPE') process.exit(0)
    throw error
  })
  try {
    const program = await buildProgram(args)
    await program.parseAsync(args, { from: 'user' })
  } catch (error) {
    process.exitCode = exitCodeOf(error)
  }
}
