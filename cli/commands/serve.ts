import { resolve } from 'node:path'
import { Option } from 'commander'
import type { Command } from 'commander'
import { resolveHome } from '../client/home.ts'
import { usageError } from '../client/cli-error.ts'
import type { GlobalOptions } from './command-context.ts'
import { withExample } from './command-context.ts'

interface ServeFlags extends GlobalOptions {
  readonly http?: string
  readonly nbd?: string
  readonly iscsi?: string
  readonly socketGroup?: string
  readonly catalog?: string
  readonly allowPrivateImageSources?: boolean
}

export function register(serve: Command): void {
  serve
    .option('--http <host:port>', 'address of the HTTP listener; port 0 picks a free one; off (default: 127.0.0.1:8776)')
    .option('--socket-group <group>', 'group that may use the NBD socket besides you (name or number)')
    .option('--catalog <path>', 'file of the catalog (default: catalog.db in the home)')
    .option(
      '--allow-private-image-sources',
      'let imports fetch over HTTP from addresses that are not public (default: they may not)',
    )
    // Known by name so that scripts can switch off what this version does not have; it is refused by name otherwise.
    .addOption(new Option('--nbd <host:port>').hideHelp())
    .addOption(new Option('--iscsi <host:port>').hideHelp())
    .action(async () => {
      const flags = serve.optsWithGlobals<ServeFlags>()
      if (flags.nbd !== undefined && flags.nbd !== 'off') {
        throw usageError(`--nbd ${flags.nbd}: this version serves NBD on its unix socket only; leave the option out, or say off`)
      }
      if (flags.iscsi !== undefined && flags.iscsi !== 'off') {
        throw usageError(`--iscsi ${flags.iscsi}: this version has no iSCSI target; leave the option out, or say off`)
      }
      // Only the daemon needs the components; a short command must not load them.
      const { serveUntilSignal } = await import('../daemon/serve-until-signal.ts')
      await serveUntilSignal({
        home: resolveHome(flags.home),
        json: flags.json === true,
        settings: {
          http: flags.http,
          socketGroup: flags.socketGroup,
          allowPrivateImageSources: flags.allowPrivateImageSources,
          catalog: flags.catalog === undefined ? undefined : resolve(flags.catalog),
        },
      })
    })
  withExample(serve, 'atoll serve --home /srv/atoll --http 127.0.0.1:8776')
}
