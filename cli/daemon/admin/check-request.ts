import { z } from 'zod'
import { pageLimitMax } from '@atoll/composer'
import { AtollError } from '@atoll/core'

/** Names, ids and sizes as typed; what they mean is checked behind this, where the limits are known. */
export const typedText = z.string().max(4096)
export const projectField = { project: typedText.optional() }
/** Which page of a listing. */
export const pageFields = {
  limit: z.coerce.number().int().min(1).max(pageLimitMax).optional(),
  marker: typedText.optional(),
}
/** A boolean in a query string. */
export const queryFlag = z.enum(['true', 'false']).transform((text) => text === 'true')

/**
 * Checks a body, query or set of parameters.
 * @throws AtollError ARGUMENT_INVALID naming the field
 */
export function checkRequest<T>(schema: z.ZodType<T>, value: unknown): T {
  const checked = schema.safeParse(value ?? {})
  if (checked.success) return checked.data
  const issue = checked.error.issues[0]
  const field = issue?.path.join('.') || 'request'
  throw new AtollError('ARGUMENT_INVALID', `${field}: ${issue?.message ?? 'is wrong'}`, { values: { field } })
}
