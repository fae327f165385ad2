import { describe, expect, test } from 'vitest'
import { checkedAddresses, isPublicAddress, type ResolvedAddress } from './import-address.ts'

describe('a public address', () => {
  test.each([
    '1.1.1.1',
    '8.8.8.8',
    '172.32.0.1',
    '100.128.0.1',
    '192.0.1.1',
    '2606:4700::1111',
    '2a00:1450::1',
    '::ffff:8.8.8.8',
    '64:ff9b::808:808',
  ])('is %s', (address) => {
    expect(isPublicAddress(address)).toBe(true)
  })

  test.each([
    '0.0.0.0',
    '10.1.2.3',
    '100.64.0.1',
    '127.0.0.1',
    '127.255.255.254',
    '169.254.169.254',
    '172.16.0.1',
    '172.31.255.255',
    '192.0.0.170',
    '192.0.2.1',
    '192.168.1.1',
    '198.18.0.1',
    '198.19.255.255',
    '198.51.100.1',
    '203.0.113.1',
    '224.0.0.1',
    '240.0.0.1',
    '255.255.255.255',
    '::',
    '::1',
    '::127.0.0.1',
    '::ffff:127.0.0.1',
    '::ffff:7f00:1',
    '::ffff:169.254.169.254',
    '::ffff:0:127.0.0.1',
    '64:ff9b::7f00:1',
    '64:ff9b::10.0.0.1',
    '64:ff9b:1::1',
    '100::1',
    'fc00::1',
    'fd00:ec2::254',
    'fe80::1',
    'fe80::1%eth0',
    'fec0::1',
    'ff02::1',
    '2001::1',
    '2001:db8::1',
    '2002:7f00:1::',
    '3fff::1',
    '5f00::1',
    'no address',
    '',
  ])('is not %s', (address) => {
    expect(isPublicAddress(address)).toBe(false)
  })
})

describe('the addresses of a host', () => {
  const lookup =
    (...addresses: string[]) =>
    async (): Promise<ResolvedAddress[]> =>
      addresses.map((address) => ({ address, family: address.includes(':') ? 6 : 4 }))

  test('are refused if one of them is not public', async () => {
    await expect(checkedAddresses('images.example', false, lookup('8.8.8.8', '10.0.0.1'))).rejects.toMatchObject({
      code: 'IMAGE_SOURCE_FORBIDDEN',
      values: { host: 'images.example', address: '10.0.0.1' },
    })
    await expect(checkedAddresses('images.example', false, lookup('8.8.8.8', '::1'))).rejects.toMatchObject({
      code: 'IMAGE_SOURCE_FORBIDDEN',
    })
    await expect(checkedAddresses('images.example', false, lookup('8.8.8.8'))).resolves.toHaveLength(1)
    await expect(checkedAddresses('images.example', true, lookup('8.8.8.8', '10.0.0.1'))).resolves.toHaveLength(2)
  })

  test('are the address itself where that is the host, however a URL wrote it', async () => {
    const refuse = async (): Promise<never> => {
      throw new Error('nothing is to be resolved')
    }
    for (const url of [
      'http://127.0.0.1/',
      'http://0x7f.1/',
      'http://2130706433/',
      'http://017700000001/',
      'http://[::1]/',
      'http://[::ffff:127.0.0.1]/',
    ]) {
      await expect(checkedAddresses(new URL(url).hostname, false, refuse)).rejects.toMatchObject({
        code: 'IMAGE_SOURCE_FORBIDDEN',
      })
    }
    await expect(checkedAddresses('[2606:4700::1111]', false, refuse)).resolves.toEqual([
      { address: '2606:4700::1111', family: 6 },
    ])
  })
})
