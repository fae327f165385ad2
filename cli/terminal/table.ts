/** What a cell can hold; nothing is shown as `-`. */
export type Cell = string | number | null | undefined

// Names come from users: an escape sequence in one must not reach the terminal of another.
// oxlint-disable-next-line no-control-regex -- control characters are what this replaces
const controlCharacters = /[\u0000-\u001f\u007f-\u009f]/g

function text(cell: Cell): string {
  if (cell === null || cell === undefined || cell === '') return '-'
  return String(cell).replaceAll(controlCharacters, '?')
}

/** Columns for people: a header in capitals, two spaces between columns, numbers to the right. Ends without a line feed. */
export function formatTable(header: readonly string[], rows: readonly (readonly Cell[])[]): string {
  const isNumeric = header.map((_, column) => rows.length > 0 && rows.every((row) => typeof row[column] === 'number'))
  const lines = [header.map((title) => title.toUpperCase()), ...rows.map((row) => header.map((_, column) => text(row[column])))]
  const widths = header.map((_, column) => Math.max(...lines.map((line) => (line[column] ?? '').length)))
  return lines
    .map((line) =>
      line
        .map((cell, column) =>
          isNumeric[column] === true ? cell.padStart(widths[column] ?? 0) : cell.padEnd(widths[column] ?? 0),
        )
        .join('  ')
        .trimEnd(),
    )
    .join('\n')
}

/** One thing for people: a line per field, values aligned. */
export function formatFields(fields: readonly (readonly [string, Cell])[]): string {
  const width = Math.max(...fields.map(([name]) => name.length))
  return fields.map(([name, value]) => `${`${name}:`.padEnd(width + 2)}${text(value)}`).join('\n')
}
