/** Options of the ceph driver; README.md has the table. */
import { isAbsolute, normalize } from 'node:path'
import { z } from 'zod'
import { checkOptions } from '../driver-options.ts'

export const cephUserDefault = 'admin'
export const cephNamespaceDefault = 'atoll'
export const cephTimeoutSecondsDefault = 60
export const cephConnectTimeoutSecondsDefault = 10
const timeoutSecondsMin = 2
const timeoutSecondsMax = 3600

const absolutePath = z
  .string()
  .min(1, 'must not be empty')
  .refine((path) => isAbsolute(path), 'must be an absolute path')
  .refine((path) => !path.includes('\0'), 'must not contain a zero byte')
  .transform((path) => normalize(path))

const seconds = z
  .string()
  .regex(/^[0-9]{1,6}$/, 'must be a whole number of seconds')
  .transform(Number)
  .refine(
    (count) => count >= timeoutSecondsMin && count <= timeoutSecondsMax,
    `must be ${timeoutSecondsMin} to ${timeoutSecondsMax} seconds`,
  )

/** What needs no quotes in a command of Ceph. */
const cephName = z.string().regex(/^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$/, 'must be 1 to 128 letters, digits, ".", "_" or "-"')

const cephOptions = z.strictObject({
  conf: absolutePath.optional(),
  pool: cephName,
  user: cephName.refine((user) => !user.startsWith('client.'), 'is the name without "client."').optional(),
  namespace: cephName.optional(),
  keyring: absolutePath.optional(),
  timeout: seconds.optional(),
  'connect-timeout': seconds.optional(),
})

export interface CephConfig {
  /** null: where Ceph's own programs look for it. */
  conf: string | null
  pool: string
  /** Without `client.`. */
  user: string
  namespace: string
  /** null: what the conf says. */
  keyring: string | null
  requestTimeoutMs: number
  /** A monitor, and the first answer of the pool, is waited for this long: who makes or opens a pool waits for it. */
  connectTimeoutMs: number
}

/** @throws AtollError POOL_OPTION_INVALID */
export function parseCephConfig(options: Readonly<Record<string, string>>): CephConfig {
  const parsed = checkOptions('ceph', cephOptions, options)
  const { conf, pool, user, namespace, keyring, timeout } = parsed
  return {
    conf: conf ?? null,
    pool,
    user: user ?? cephUserDefault,
    namespace: namespace ?? cephNamespaceDefault,
    keyring: keyring ?? null,
    requestTimeoutMs: (timeout ?? cephTimeoutSecondsDefault) * 1000,
    connectTimeoutMs: (parsed['connect-timeout'] ?? cephConnectTimeoutSecondsDefault) * 1000,
  }
}
