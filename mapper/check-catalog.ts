/** The catalog as a database: its own structure, and rows that refer to ones which are not there. */
import type { CheckContext } from './check-finding.ts'
import { ownTables } from './check-references.ts'

export async function checkCatalog(check: CheckContext): Promise<void> {
  const { catalog } = check.mapper
  const { damages, dangling } = await catalog.verify()
  for (const damage of damages) {
    const message = `the database is damaged (${damage}): bring it back from a backup`
    check.add({ severity: 'error', kind: 'catalog-damaged', object: catalog.path, message })
  }
  for (const { table, rowId, parent } of dangling) {
    if (ownTables.has(table)) continue
    const object = `${table} row ${rowId}`
    const message = `${object} refers to a row of ${parent} that is not there: bring the catalog back from a backup`
    check.add({ severity: 'error', kind: 'reference-dangling', object, message })
  }
}
