import { execFile } from 'node:child_process'
import { copyFile, mkdir, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'

/** Whom a certificate is for, and what is unusual about it. */
export interface CertificateOptions {
  readonly commonName: string
  /** Default: a server's, for localhost and the loopback addresses. */
  readonly usage?: 'server' | 'client'
  /** Default 1; a negative number has expired already. */
  readonly days?: number
  /** Default: an elliptic curve's, which takes no time to make. */
  readonly key?: 'ec' | 'rsa'
}

const keyParameters = { ec: ['ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1'], rsa: ['rsa:2048'] } as const

/** Runs openssl with the parameters of all groups. */
const openssl = async (...groups: readonly (readonly string[])[]): Promise<void> => {
  await promisify(execFile)('openssl', groups.flat(), { timeout: 300_000 })
}

/** An authority of a test, in a folder of its own. */
export class TestAuthority {
  readonly directory: string

  private constructor(directory: string) {
    this.directory = directory
  }

  /** Makes the folder, a key, and the authority's own certificate `ca-cert.pem`. */
  static async create(directory: string, commonName = 'the authority of a test'): Promise<TestAuthority> {
    const authority = new TestAuthority(directory)
    await mkdir(directory, { recursive: true })
    await openssl(
      ['req', '-x509', '-newkey', ...keyParameters.ec, '-nodes', '-days', '2', '-subj', `/CN=${commonName}`],
      ['-keyout', join(directory, 'ca-key.pem'), '-out', authority.certificatePath],
    )
    return authority
  }

  get certificatePath(): string {
    return join(this.directory, 'ca-cert.pem')
  }

  /** Makes a folder with the authority's certificate and `server-cert.pem` and `server-key.pem`, or the client's. */
  async issue(directory: string, options: CertificateOptions): Promise<string> {
    const { commonName, usage = 'server', days = 1, key = 'ec' } = options
    await mkdir(directory, { recursive: true })
    if (directory !== this.directory) await copyFile(this.certificatePath, join(directory, 'ca-cert.pem'))
    const request = join(directory, `${usage}-request.pem`)
    const names = usage === 'server' ? ['-addext', 'subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1'] : []
    await openssl(
      ['req', '-new', '-newkey', ...keyParameters[key], '-nodes', '-subj', `/CN=${commonName}`, ...names],
      ['-addext', `extendedKeyUsage=${usage}Auth`, '-keyout', join(directory, `${usage}-key.pem`), '-out', request],
    )
    await openssl(
      ['x509', '-req', '-in', request, '-CA', this.certificatePath, '-CAkey', join(this.directory, 'ca-key.pem')],
      ['-copy_extensions', 'copy', '-days', String(days), '-out', join(directory, `${usage}-cert.pem`)],
    )
    return directory
  }

  /** Writes a list of revoked certificates to `path`, with these on it. */
  async revoke(path: string, ...certificatePaths: readonly string[]): Promise<void> {
    const database = join(this.directory, 'database.txt')
    const settings = join(this.directory, 'revoke.cnf')
    const number = join(this.directory, 'list-number.txt')
    await writeFile(
      settings,
      `[ca]
default_ca = this
[this]
database = ${database}
crlnumber = ${number}
default_md = sha256
default_crl_days = 2
unique_subject = no
crl_extensions = list
[list]
authorityKeyIdentifier = keyid
`,
    )
    await writeFile(database, '')
    await writeFile(number, '01\n')
    const authority = ['-config', settings, '-cert', this.certificatePath, '-keyfile', join(this.directory, 'ca-key.pem')]
    for (const certificatePath of certificatePaths) await openssl(['ca', ...authority, '-revoke', certificatePath])
    await openssl(['ca', ...authority, '-gencrl', '-out', path])
  }
}
