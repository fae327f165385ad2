// The client side of the daemon's admin socket: HTTP over a unix socket, JSON both ways. Only node:http, so that a short
// command does not pay for anything else, and of that no more than it needs:
// - `import` of node:http evaluates all that it exports, and one of them is a WebSocket, for which Node loads undici;
// - the agent looks whether the host's name is an address, and that expression takes longer to compile than the request.
import type { IncomingMessage, RequestOptions } from 'node:http'
import type { Socket } from 'node:net'
import type { Readable } from 'node:stream'
import { adminSocketPath } from './home.ts'
import { CliError } from './cli-error.ts'

const { request } = process.getBuiltinModule('node:http')
const { connect } = process.getBuiltinModule('node:net')

/** Values of a query string; what is undefined is left out. */
export type Query = Readonly<Record<string, string | number | boolean | undefined>>

export class AdminClient {
  readonly home: string

  constructor(home: string) {
    this.home = home
  }

  /** @throws CliError with the daemon's code, or DAEMON_NOT_RUNNING */
  get<T>(path: string, query: Query = {}): Promise<T> {
    return this.send<T>('GET', withQuery(path, query))
  }

  /** @throws CliError */
  post<T>(path: string, body: unknown = {}, query: Query = {}): Promise<T> {
    return this.send<T>('POST', withQuery(path, query), JSON.stringify(body))
  }

  /** @throws CliError */
  delete<T>(path: string, query: Query = {}): Promise<T> {
    return this.send<T>('DELETE', withQuery(path, query))
  }

  /**
   * Sends a stream as the body. The daemon may answer (and refuse) before the stream has ended.
   * @throws CliError
   */
  upload<T>(path: string, query: Query, body: Readable): Promise<T> {
    return this.send<T>('POST', withQuery(path, query), body)
  }

  /**
   * Hands the body of an answer to `receive`, which reads it to its end or destroys it. `lengthBytes` is how much content it is.
   * @throws CliError, also when less came, and what `receive` throws
   */
  async download(
    path: string,
    { query, accept }: { query: Query; accept: string },
    receive: (body: Readable, lengthBytes: number) => Promise<void>,
  ): Promise<void> {
    const { promise, resolve, reject } = Promise.withResolvers<IncomingMessage>()
    const options = { createConnection: () => this.connect(), path: withQuery(path, query), headers: { accept } }
    const asked = request(options, resolve)
    asked.on('error', (error) => reject(this.connectionError(error)))
    asked.end()
    const response = await promise
    if (response.statusCode !== 200) {
      const refused = Promise.withResolvers<never>()
      settle(response, await readBody(response), () => undefined, refused.reject)
      await refused.promise
    }
    const lost: { error: unknown } = { error: null }
    response.once('error', (error) => (lost.error = error))
    try {
      await receive(response, Number(response.headers['atoll-length']))
    } catch (error) {
      if (lost.error !== null) throw new CliError('IO_ERROR', `the daemon could not read all of it: see its log`)
      throw error
    } finally {
      asked.destroy()
    }
  }

  private send<T>(method: string, path: string, body?: string | Readable): Promise<T> {
    const { promise, resolve, reject } = Promise.withResolvers<T>()
    const headers =
      body === undefined ? {} : { 'content-type': typeof body === 'string' ? 'application/json' : 'application/octet-stream' }
    // Without the agent the daemon would end the connection with its answer, under a body that is still on its way.
    const connection: RequestOptions =
      typeof body === 'object' ? { socketPath: adminSocketPath(this.home) } : { createConnection: () => this.connect() }
    const sent = request({ ...connection, method, path, headers }, (response) => {
      readBody(response).then(
        (text) => {
          // An answer may come before the body has ended: the daemon refused it, and the rest is wanted by nobody.
          if (typeof body === 'object') {
            body.destroy()
            sent.destroy()
          }
          settle(response, text, resolve, reject)
        },
        (error: unknown) => reject(this.connectionError(error)),
      )
    })
    sent.on('error', (error) => reject(this.connectionError(error)))
    if (typeof body === 'object') {
      body.on('error', (error) => {
        sent.destroy()
        reject(new CliError('IO_ERROR', `reading the input failed: ${error.message}`))
      })
      body.pipe(sent)
    } else {
      sent.end(body)
    }
    return promise
  }

  private connect(): Socket {
    return connect(adminSocketPath(this.home))
  }

  private connectionError(error: unknown): CliError {
    const code = (error as NodeJS.ErrnoException).code
    if (code === 'ENOENT' || code === 'ECONNREFUSED') {
      return new CliError(
        'DAEMON_NOT_RUNNING',
        `no daemon serves ${this.home}: start one with 'npm start' or 'atoll serve', or name its --home`,
      )
    }
    if (code === 'EACCES' || code === 'EPERM') {
      return new CliError(
        'DAEMON_NOT_RUNNING',
        `${adminSocketPath(this.home)} is not yours to use: run this as the user that runs the daemon`,
      )
    }
    return new CliError(
      'DAEMON_NOT_RUNNING',
      `the daemon at ${this.home} went away: ${error instanceof Error ? error.message : String(error)}`,
    )
  }
}

function withQuery(path: string, query: Query): string {
  const parameters = new URLSearchParams()
  for (const [name, value] of Object.entries(query)) if (value !== undefined) parameters.set(name, String(value))
  const text = parameters.toString()
  return text === '' ? path : `${path}?${text}`
}

async function readBody(response: IncomingMessage): Promise<string> {
  const parts: Buffer[] = []
  for await (const part of response) parts.push(part as Buffer)
  return Buffer.concat(parts).toString('utf8')
}

function settle<T>(
  response: IncomingMessage,
  text: string,
  resolve: (value: T) => void,
  reject: (error: CliError) => void,
): void {
  let body: unknown
  try {
    body = text === '' ? undefined : JSON.parse(text)
  } catch {
    reject(new CliError('INTERNAL', `the daemon answered ${response.statusCode} with something that is not JSON`))
    return
  }
  const status = response.statusCode ?? 500
  if (status >= 200 && status < 300) {
    resolve(body as T)
    return
  }
  const error = body as { code?: string; message?: string } | undefined
  reject(new CliError(error?.code ?? 'INTERNAL', error?.message ?? `the daemon answered ${status}`))
}

/** One segment of a path: names may hold any character but "/". */
export function segment(text: string): string {
  return encodeURIComponent(text)
}
