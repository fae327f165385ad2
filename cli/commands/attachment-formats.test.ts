import { expect, test } from 'vitest'
import type { AttachmentDocument } from '../admin-types.ts'
import { attachmentText } from './attachment-formats.ts'

const attachment: AttachmentDocument = {
  id: '11111111-1111-4111-8111-111111111111',
  protocol: 'nbd',
  readOnly: true,
  shared: true,
  exportName: '22222222-2222-4222-8222-222222222222',
  socketPath: "/srv/a&b's <home>/nbd.sock",
  uri: 'nbd+unix:///22222222-2222-4222-8222-222222222222?socket=/srv/x',
  connections: 0,
  createdAt: '2026-01-01T00:00:00.000Z',
}

test('uri is the URI alone, text adds what limits its use', () => {
  expect(attachmentText(attachment, 'uri')).toBe(attachment.uri)
  expect(attachmentText(attachment, 'text')).toBe(`${attachment.uri}  read-only  shared`)
  expect(attachmentText({ ...attachment, readOnly: false, shared: false }, 'text')).toBe(attachment.uri)
})

test('qemu is one line of JSON with a reconnect delay, and says that the content is raw', () => {
  expect(JSON.parse(attachmentText(attachment, 'qemu'))).toEqual({
    driver: 'raw',
    'node-name': 'atoll-22222222',
    'read-only': true,
    file: {
      driver: 'nbd',
      server: { type: 'unix', path: attachment.socketPath },
      export: attachment.exportName,
      'reconnect-delay': 60,
    },
  })
})

test('libvirt is an element whose values are escaped', () => {
  const xml = attachmentText(attachment, 'libvirt')
  expect(xml).toContain("socket='/srv/a&amp;b&apos;s &lt;home&gt;/nbd.sock'")
  expect(xml).toContain('<readonly/>')
  expect(xml).toContain('<shareable/>')
  expect(attachmentText({ ...attachment, readOnly: false, shared: false }, 'libvirt')).not.toMatch(/readonly|shareable/)
})
