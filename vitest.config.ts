import { defineConfig } from 'vitest/config'

export default defineConfig({
  test: {
    include: ['**/*.test.ts'],
    exclude: ['**/node_modules/**', 'native/target/**'],
    // Processes, not threads: the addon has threads of its own, and a crash of one file's process is that file's failure.
    pool: 'forks',
    maxWorkers: 2,
    setupFiles: ['tests/quick-bytes.ts'],
    // Only for what hangs: how fast the machine is, and what else runs on it, must not decide.
    testTimeout: 600_000,
    hookTimeout: 600_000,
    expect: { poll: { timeout: 300_000 } },
  },
})
