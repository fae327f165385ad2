/** Where a daemon can be reached; null is off. */
export interface Endpoints {
  readonly home: string
  readonly http: string | null
  readonly nbd: string | null
  readonly nbdSocket: string | null
  readonly iscsi: string | null
}

/** The object that `serve --json` prints when clients can come. */
export interface ReadyDocument extends Omit<Endpoints, 'home'> {
  readonly ready: true
  readonly home: string
  readonly pid: number
}

export function readyDocument(endpoints: Endpoints, pid: number): ReadyDocument {
  const { http, nbd, nbdSocket, iscsi, home } = endpoints
  return { ready: true, http, nbd, nbdSocket, iscsi, home, pid }
}

/** The same for people: one line that starts with `ready`. */
export function readyLine(endpoints: Endpoints, pid: number): string {
  const parts: string[] = ['ready']
  if (endpoints.http !== null) parts.push(endpoints.http)
  if (endpoints.nbd !== null) parts.push(endpoints.nbd)
  if (endpoints.nbdSocket !== null) parts.push(`nbd+unix at ${endpoints.nbdSocket}`)
  if (endpoints.iscsi !== null) parts.push(endpoints.iscsi)
  parts.push(`home ${endpoints.home}`, `pid ${pid}`)
  return parts.join('  ')
}
