/** What the fault driver takes: a seed and rules, as an object or as the text of the pool option `faults`. */
import { constants } from 'node:os'
import { AtollError } from '@atoll/core'
import { z } from 'zod'

export const faultOperations = [
  'read',
  'write',
  'punch',
  'zero',
  'sync',
  'append',
  'segment-sync',
  'create',
  'remove',
  'open',
  'lose-write',
  'record-read',
  'record-write',
  'record-list',
  'record-remove',
] as const

const errnoNumber = z.union([
  z.int().min(0).max(4095),
  z.string().transform((name, context) => {
    const found = (constants.errno as Readonly<Record<string, number>>)[name]
    if (found !== undefined) return found
    context.addIssue({ code: 'custom', message: `there is no errno "${name}"` })
    return z.NEVER
  }),
])

const ruleSchema = z.strictObject({
  /** Which calls of the store. */
  operation: z.enum(faultOperations),
  /** Only on this layer; default: any. */
  layer: z.uuid().optional(),
  /** Let this many matching calls pass first. Default 0. */
  skipCount: z.int().min(0).default(0),
  /** Then hit this many; default: all that follow. */
  applyCount: z.int().min(1).default(Number.MAX_SAFE_INTEGER),
  /** About how many of 256 matching calls are hit. Default 256: all. */
  probabilityOf256: z.int().min(1).max(256).default(256),
  /** What the call answers with: a number or a name such as EIO; 0: it succeeds (delay only). Default EIO. */
  errno: errnoNumber.default(constants.errno.EIO),
  /** Wait before answering, until other faults are set at most. Default 0. */
  delayMs: z.int().min(0).max(60_000).default(0),
  /** A failed write leaves a part of its bytes behind. Default false. */
  tear: z.boolean().default(false),
})

const planSchema = z.strictObject({
  /** Seed of every random decision: the same seed and the same calls fail alike. Default 1. */
  seed: z.int().min(0).default(1),
  /** The first rule that matches a call counts. */
  rules: z.array(ruleSchema).max(64).default([]),
})

/** With every field filled in, as the native store takes it. */
export type FaultPlan = z.output<typeof planSchema>
export type FaultPlanInput = z.input<typeof planSchema>

/** Fills in the defaults. @throws AtollError POOL_OPTION_INVALID naming the field */
export function parseFaultPlan(plan: unknown): FaultPlan {
  const checked = planSchema.safeParse(plan)
  if (checked.success) return checked.data
  const problems = checked.error.issues.map((issue) => `${issue.path.join('.') || 'faults'}: ${issue.message}`)
  throw new AtollError('POOL_OPTION_INVALID', `the plan of faults is wrong: ${problems.join('; ')}`, { values: { problems } })
}

/** The plan in the pool option `faults` (JSON); null if there is none. @throws AtollError POOL_OPTION_INVALID */
export function parseFaultOption(text: string | undefined): FaultPlan | null {
  if (text === undefined) return null
  let plan: unknown
  try {
    plan = JSON.parse(text)
  } catch (error) {
    throw new AtollError('POOL_OPTION_INVALID', `the option "faults" is not JSON: ${(error as Error).message}`, {
      values: { faults: text },
      cause: error,
    })
  }
  return parseFaultPlan(plan)
}
