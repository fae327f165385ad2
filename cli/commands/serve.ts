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
  readonly nbdTls?: string
  readonly nbdTlsVerify?: 'on' | 'off'
  readonly nbdInsecure?: boolean
  readonly nbdList?: boolean
  readonly iscsi?: string
  readonly socketGroup?: string
  readonly catalog?: string
  readonly allowPrivateImageSources?: boolean
}

export function register(serve: Command): void {
  serve
    .option('--http <host:port>', 'address of the HTTP listener; port 0 picks a free one; off (default: 127.0.0.1:8776)')
    .option('--nbd <host:port>', 'address of NBD over TCP; port 0 picks a free one; off (default: off)')
    .option('--nbd-tls <dir>', 'folder with ca-cert.pem, server-cert.pem and server-key.pem, for NBD over TCP')
    .addOption(
      new Option('--nbd-tls-verify <on|off>', 'whether clients need a certificate of that authority (default: on)').choices([
        'on',
        'off',
      ]),
    )
    .option('--nbd-insecure', 'NBD over TCP without TLS: whoever reaches the port uses every attached volume')
    .option('--nbd-list', 'tell clients over TCP which volumes are attached')
    .option('--socket-group <group>', 'group that may use the NBD socket besides you (name or number)')
    .option('--catalog <path>', 'file of the catalog (default: catalog.db in the home)')
    .option(
      '--allow-private-image-sources',
      'let imports fetch over HTTP from addresses that are not public (default: they may not)',
    )
    // Known by name so that scripts can switch off what this version does not have; it is refused by name otherwise.
    .addOption(new Option('--iscsi <host:port>').hideHelp())
    .action(async () => {
      const flags = serve.optsWithGlobals<ServeFlags>()
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
          nbd: flags.nbd,
          nbdTls: flags.nbdTls === undefined ? undefined : resolve(flags.nbdTls),
          nbdTlsVerify: flags.nbdTlsVerify,
          nbdInsecure: flags.nbdInsecure,
          nbdList: flags.nbdList,
          socketGroup: flags.socketGroup,
          allowPrivateImageSources: flags.allowPrivateImageSources,
          catalog: flags.catalog === undefined ? undefined : resolve(flags.catalog),
        },
      })
    })
  withExample(serve, 'atoll serve --home /srv/atoll --http 127.0.0.1:8776')
}
