/**
 * Names of pools, volumes, snapshots and images: 1 to 255 characters. "/" and "@" are left out, because a snapshot is
 * written VOL@SNAP and a file CONTAINER/NAME; something that looks like an id is refused, because an id is accepted wherever
 * a name is. Names of resources need not be unique.
 */
import { AtollError } from './errors.ts'
import { isId } from './ids.ts'

export const nameLengthMax = 255

// Control characters, format characters that reorder text on a terminal, lone surrogates, line and paragraph separators.
const forbiddenPattern = /[\p{Cc}\p{Cs}\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/u

export type NamedKind = 'pool' | 'volume' | 'snapshot' | 'image' | 'project'

/** Checks a new name. @throws AtollError NAME_INVALID with the name and the rule that it breaks */
export function checkName(kind: NamedKind, name: string): void {
  const refuse = (why: string): never => {
    throw new AtollError('NAME_INVALID', `${kind} name ${JSON.stringify(name)} ${why}`, { values: { kind, name } })
  }
  const lengthCharacters = [...name].length
  if (lengthCharacters === 0) refuse('is empty: a name has 1 to 255 characters')
  if (lengthCharacters > nameLengthMax) refuse(`has ${lengthCharacters} characters: at most ${nameLengthMax} are allowed`)
  if (forbiddenPattern.test(name)) refuse('has control or invisible characters, which are not allowed')
  if (name.trim() !== name) refuse('begins or ends with a space, which is not allowed')
  if (/[/@]/.test(name)) refuse('contains "/" or "@", which are not allowed')
  if (name === '.' || name === '..' || name === '-') refuse('is reserved')
  if (name.startsWith('-')) refuse('begins with "-", which would be read as an option')
  if (isId(name.toLowerCase())) refuse('looks like an id, which is not allowed')
}

/**
 * The two parts of VOL@SNAP. Both must be there; each is a name or an id.
 * @throws AtollError NAME_INVALID
 */
export function parseSnapshotName(text: string): { volume: string; snapshot: string } {
  const parts = text.split('@')
  const [volume, snapshot] = parts
  if (parts.length !== 2 || !volume || !snapshot) {
    throw new AtollError('NAME_INVALID', `${JSON.stringify(text)} is not the name of a snapshot: VOLUME@SNAPSHOT is wanted`, {
      values: { kind: 'snapshot', name: text },
    })
  }
  return { volume, snapshot }
}
