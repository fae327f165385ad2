/**
 * The process that `killAtScenario` kills: does what its second argument says over the folder of its first, prints one line
 * when it is where the test wants it, and goes on until it is killed.
 */
import { TestClient, TestDaemon, mebibyte } from './testing.ts'

const [folder = '', scenario = '', ...parameters] = process.argv.slice(2)
const { composer } = await TestDaemon.open(folder)
// A promise that is waited for does not keep a process alive.
setInterval(() => undefined, 1 << 30)

async function afterFirstStep(jobId: string): Promise<void> {
  const stepped = Promise.withResolvers<void>()
  composer.jobs
    .wait(jobId, { onProgress: ({ progressBytes }) => void (progressBytes > 0 && stepped.resolve()) })
    .catch(stepped.reject)
  await stepped.promise
  process.stdout.write(`${jobId}\n`)
}

switch (scenario) {
  case 'attached': {
    const { id } = await composer.volumes.create({ name: 'disk', sizeBytes: 64 * mebibyte })
    const { uri } = await composer.volumes.attach('disk')
    const client = new TestClient(composer, id)
    await client.device.write(0, Buffer.from('before'))
    await composer.snapshots.create(['disk@first'])
    await client.device.write(40 * mebibyte, Buffer.from('flushed'))
    await client.device.flush()
    process.stdout.write(`${uri}\n`)
    break
  }
  case 'import': {
    const [path = ''] = parameters
    await afterFirstStep((await composer.images.import({ name: 'image', path })).id)
    break
  }
  case 'export': {
    const [path = ''] = parameters
    await afterFirstStep((await composer.images.export('image', { path })).id)
    break
  }
  case 'put': {
    const stream = async function* (): AsyncGenerator<Uint8Array> {
      for (let piece = 0; piece < 8; piece += 1) yield Buffer.alloc(mebibyte, 1)
      process.stdout.write('most of it is written\n')
      await new Promise(() => undefined)
    }
    await composer.files.put({ container: 'c', name: 'n', stream: stream() })
    break
  }
  default:
    throw new Error(`there is no scenario ${scenario}`)
}
