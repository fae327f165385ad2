/** How drivers check the options of a pool: a zod object schema, and errors that name the option. */
import { AtollError } from '@atoll/core'
import type { z } from 'zod'

/**
 * Checks `options` against `schema` and returns what it makes of them.
 * @throws AtollError POOL_OPTION_INVALID naming each option, its value and what is allowed
 */
export function checkOptions<Schema extends z.ZodObject>(
  driver: string,
  schema: Schema,
  options: Readonly<Record<string, string>>,
): z.output<Schema> {
  const checked = schema.safeParse(options)
  if (checked.success) return checked.data
  const known = Object.keys(schema.shape)
  const problems = checked.error.issues.map((issue) => {
    if (issue.code === 'unrecognized_keys')
      return `there is no option "${issue.keys.join('", "')}" (there are: ${known.join(', ')})`
    const name = String(issue.path[0])
    const value = options[name]
    return value === undefined ? `the option "${name}" is missing` : `"${name}" = ${JSON.stringify(value)}: ${issue.message}`
  })
  throw new AtollError('POOL_OPTION_INVALID', `driver ${driver}: ${problems.join('; ')}`, { values: { driver, problems } })
}
