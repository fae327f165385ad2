import { describe, expect, test } from 'vitest'
import type { AttachmentDocument } from '../admin-types.ts'
import { attachmentNote, attachmentText } from './attachment-formats.ts'

const attachment: AttachmentDocument = {
  id: '11111111-1111-4111-8111-111111111111',
  protocol: 'nbd',
  readOnly: true,
  shared: true,
  exportName: '22222222-2222-4222-8222-222222222222',
  socketPath: "/srv/a&b's <home>/nbd.sock",
  server: null,
  uri: 'nbd+unix:///22222222-2222-4222-8222-222222222222?socket=/srv/x',
  connections: 0,
  createdAt: '2026-01-01T00:00:00.000Z',
}

test('uri is the URI alone, text adds what limits its use', () => {
  expect(attachmentText(attachment, 'uri')).toBe(attachment.uri)
  expect(attachmentText(attachment, 'text')).toBe(`${attachment.uri}  read-only  shared`)
  expect(attachmentText({ ...attachment, readOnly: false, shared: false }, 'text')).toBe(attachment.uri)
})

test('qemu is one line of JSON with a reconnect delay, passes discards on, and says that the content is raw', () => {
  expect(JSON.parse(attachmentText(attachment, 'qemu'))).toEqual({
    driver: 'raw',
    'node-name': 'atoll-22222222',
    'read-only': true,
    discard: 'unmap',
    file: {
      driver: 'nbd',
      discard: 'unmap',
      server: { type: 'unix', path: attachment.socketPath },
      export: attachment.exportName,
      'reconnect-delay': 60,
    },
  })
})

test('libvirt is an element that passes discards on, and its values are escaped', () => {
  const xml = attachmentText(attachment, 'libvirt')
  expect(xml).toContain("<driver name='qemu' type='raw' discard='unmap'/>")
  expect(xml).toContain("socket='/srv/a&amp;b&apos;s &lt;home&gt;/nbd.sock'")
  expect(xml).toContain('<readonly/>')
  expect(xml).toContain('<shareable/>')
  expect(attachmentText({ ...attachment, readOnly: false, shared: false }, 'libvirt')).not.toMatch(/readonly|shareable/)
})

describe('an attachment over TCP', () => {
  const overTcp = (tls: boolean): AttachmentDocument => ({
    ...attachment,
    socketPath: null,
    server: { host: 'storage.example', port: 10_809, tls },
    uri: `${tls ? 'nbds' : 'nbd'}://storage.example:10809/${attachment.exportName}`,
  })

  test('is for qemu an address, and with TLS the id of an object that a note explains', () => {
    const plain = { type: 'inet', host: 'storage.example', port: '10809' }
    expect(JSON.parse(attachmentText(overTcp(false), 'qemu')).file).toEqual({
      driver: 'nbd',
      discard: 'unmap',
      server: plain,
      export: attachment.exportName,
      'reconnect-delay': 60,
    })
    expect(attachmentNote(overTcp(false), 'qemu')).toBeNull()
    expect(JSON.parse(attachmentText(overTcp(true), 'qemu')).file).toMatchObject({ server: plain, 'tls-creds': 'atoll-tls' })
    expect(attachmentNote(overTcp(true), 'qemu')).toContain('-object tls-creds-x509,id=atoll-tls,endpoint=client,dir=DIR')
  })

  test('is for libvirt a host with a port, and TLS is asked for where it is served', () => {
    const host = `<host name='storage.example' port='10809'/>`
    const source = `<source protocol='nbd' name='${attachment.exportName}'`
    expect(attachmentText(overTcp(false), 'libvirt')).toContain(`${source}>\n    ${host}`)
    expect(attachmentText(overTcp(true), 'libvirt')).toContain(`${source} tls='yes'>\n    ${host}`)
    expect(attachmentNote(overTcp(true), 'libvirt')).toContain('nbd_tls_x509_cert_dir')
  })

  test('needs no note as a URI, and none over the unix socket', () => {
    expect(attachmentText(overTcp(true), 'uri')).toBe(`nbds://storage.example:10809/${attachment.exportName}`)
    expect(attachmentNote(overTcp(true), 'uri')).toBeNull()
    expect(attachmentNote(attachment, 'qemu')).toBeNull()
  })
})
