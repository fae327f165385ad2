/** Ids are UUIDs (version 4) in lower case with hyphens. */
import { randomUUID } from 'node:crypto'
import { AtollError } from './errors.ts'

/** Where new ids come from; handed in, so that a test can replay a run. */
export type NewId = () => string

const idPattern = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/

/** A random id. */
export const newId: NewId = () => randomUUID()

/** Whether `text` is an id as this project writes them. */
export function isId(text: string): boolean {
  return idPattern.test(text)
}

/** `text` in lower case if it is a UUID in any case. @throws AtollError ID_INVALID */
export function parseId(text: string): string {
  const id = text.toLowerCase()
  if (!isId(id)) {
    throw new AtollError('ID_INVALID', `"${text}" is not an id: a UUID such as 123e4567-e89b-42d3-a456-426614174000 is wanted`, {
      values: { id: text },
    })
  }
  return id
}
