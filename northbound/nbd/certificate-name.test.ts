import { readFile } from 'node:fs/promises'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { X509Certificate } from 'node:crypto'
import { afterEach, beforeEach, expect, it } from 'vitest'
import { describeWithTools, opensslTool, TestAuthority } from '@atoll/nbd-client/testing'
import { certificateName } from './certificate-name.ts'

let directory: string
beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'atoll-names-'))
})
afterEach(async () => {
  await rm(directory, { recursive: true, force: true })
})

/** What a certificate of this name, as openssl writes it, is called. */
async function nameOf(commonName: string): Promise<string> {
  const authority = await TestAuthority.create(directory, commonName)
  return certificateName(new X509Certificate(await readFile(authority.certificatePath)).raw)
}

describeWithTools('the name of a certificate', [opensslTool], () => {
  it('is its common name', async () => {
    expect(await nameOf('host-7.example')).toBe('host-7.example')
    expect(await nameOf('two words')).toBe('two words')
  })

  it('is one line of printable text, however it was written', async () => {
    expect(await nameOf('a\nb\u001b[31m')).not.toMatch(/\p{C}/u)
    expect((await nameOf('x'.repeat(64))).length).toBeLessThanOrEqual(65)
  })

  it('is a sentence for what is no certificate', () => {
    expect(certificateName(Buffer.from('nothing'))).toBe('a certificate that cannot be read')
  })
})
