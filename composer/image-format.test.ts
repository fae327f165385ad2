import { describe, expect, test } from 'vitest'
import { detectFormat, requireSupported } from './image-format.ts'

function head(text: string, offsetBytes = 0): Buffer {
  const buffer = Buffer.alloc(512)
  buffer.write(text, offsetBytes, 'latin1')
  return buffer
}
const noTail = Buffer.alloc(0)

describe('the format of an image', () => {
  test.each([
    ['qcow2', head('QFI\xfb\0\0\0\x03')],
    ['qcow2', head('QFI\xfb\0\0\0\x02')],
    ['qcow', head('QFI\xfb\0\0\0\x01')],
    ['vmdk', head('KDMV')],
    ['vmdk', head('COWD')],
    ['vmdk', head('# Disk DescriptorFile\n')],
    ['vdi', head('\x7f\x10\xda\xbe', 64)],
    ['vhdx', head('vhdxfile')],
    ['vhd', head('conectix')],
    ['raw', head('anything else')],
    ['raw', Buffer.from('short')],
    ['raw', noTail],
  ])('is told to be %s by its magic', (format, start) => {
    expect(detectFormat(start, noTail)).toBe(format)
  })

  test('is vhd when only the footer says so', () => {
    expect(detectFormat(head(''), head('conectix'))).toBe('vhd')
  })

  test('is refused by name when it cannot be imported', () => {
    expect(() => requireSupported('qed', '/images/disk.qed')).toThrow(/disk\.qed looks like qed/)
    expect(requireSupported('qcow2', '/x')).toBe('qcow2')
  })
})
