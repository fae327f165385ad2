// Who may import whom, and why: the table behind scripts/check-dependencies.ts.

export interface PackageRule {
  /** The package's folder from the root. */
  readonly folder: string
  /** Packages of ours that it may import. */
  readonly mayImport: readonly string[]
  /** Why nothing else: shown with a violation. */
  readonly reason: string
}

/**
 * Dependencies point one way: cli -> northbound -> composer -> mapper -> southbound -> native -> core.
 * A package may skip levels downwards where its line says so.
 */
export const packageRules: Readonly<Record<string, PackageRule>> = {
  '@atoll/core': {
    folder: 'core',
    mayImport: [],
    reason: 'core is what everything stands on, so it can stand on nothing of ours',
  },
  '@atoll/native': {
    folder: 'native',
    mayImport: ['@atoll/core'],
    reason: 'the door to the engine converts and forwards; it decides nothing and knows no component above it',
  },
  '@atoll/nbd-client': {
    folder: 'southbound/nbd/client',
    mayImport: [],
    reason: 'the NBD client is a library of its own that works without the rest of Atoll',
  },
  '@atoll/southbound': {
    folder: 'southbound',
    mayImport: ['@atoll/core', '@atoll/native', '@atoll/nbd-client'],
    reason: "a driver stores layers; what they mean is the mapper's business, and drivers must not depend on it",
  },
  '@atoll/mapper': {
    folder: 'mapper',
    mayImport: ['@atoll/core', '@atoll/native', '@atoll/southbound'],
    reason: 'the mapper owns maps and layers and must not know who has a volume open or how it is spoken to',
  },
  '@atoll/composer': {
    folder: 'composer',
    mayImport: ['@atoll/core', '@atoll/native', '@atoll/nbd-client', '@atoll/southbound', '@atoll/mapper'],
    reason: 'the composer opens volumes; protocols and commands are built on it, never the other way round',
  },
  '@atoll/northbound': {
    folder: 'northbound',
    mayImport: ['@atoll/core', '@atoll/native', '@atoll/composer'],
    reason: 'a protocol sees volumes only as the composer shows them; reaching below would go round leases and attachments',
  },
  '@atoll/cli': {
    folder: 'cli',
    mayImport: ['@atoll/core', '@atoll/native', '@atoll/southbound', '@atoll/mapper', '@atoll/composer', '@atoll/northbound'],
    reason: 'the daemon puts the components together, and nothing imports it',
  },
  '@atoll/bench': {
    folder: 'bench',
    mayImport: ['@atoll/core', '@atoll/native', '@atoll/southbound', '@atoll/mapper'],
    reason: 'a comparison drives the daemon from outside, as its peers are driven; only costs of parts look at parts',
  },
  '@atoll/release': {
    folder: 'release',
    mayImport: ['@atoll/nbd-client'],
    reason: 'a release is packed from files and used like a user does; it runs nothing of the checkout',
  },
  '@atoll/tests': {
    folder: 'tests',
    mayImport: [
      '@atoll/core',
      '@atoll/native',
      '@atoll/nbd-client',
      '@atoll/southbound',
      '@atoll/mapper',
      '@atoll/composer',
      '@atoll/northbound',
    ],
    reason: 'tests that cross components start the CLI as a process instead of importing it',
  },
}

/** The one file that may load the compiled addon. */
export const addonLoader = 'native/addon.ts'
