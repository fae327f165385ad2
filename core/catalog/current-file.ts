import { sql } from 'kysely'

/** "This row of `files` is what its name means now", spelt as the index of these rows has it: with a parameter it is not used. */
export const currentFile = sql<boolean>`files.is_current = 1`
