import { once } from 'node:events'
import { createServer } from 'node:net'

/** Ports that the system gives to nobody by itself: its own begin at 32768 (net.ipv4.ip_local_port_range). */
const [firstPort, portCount] = [20_000, 12_000]
/** Where processes that are started one after the other begin to look: far from each other, all of them somewhere else. */
const portsApart = 101

/**
 * A free TCP port of 127.0.0.1 for what must listen on the same one again: a port that was `:0` may meanwhile be another's, most of
 * all the near end of somebody's connection.
 */
export async function freePort(): Promise<number> {
  for (let offset = 0; offset < portCount; offset += 1) {
    const port = firstPort + ((process.pid * portsApart + offset) % portCount)
    const server = createServer()
    const listening = once(server, 'listening').then(
      () => true,
      () => false,
    )
    server.listen(port, '127.0.0.1')
    if (!(await listening)) continue
    await new Promise((resolve) => server.close(resolve))
    return port
  }
  throw new Error(`no port from ${firstPort} to ${firstPort + portCount} is free`)
}
