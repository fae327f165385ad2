export { TestAuthority } from './certificates.ts'
export type { CertificateOptions } from './certificates.ts'
export { startNbdkit, startQemuNbd } from './peer-process.ts'
export type { PeerProcess } from './peer-process.ts'
export {
  describeWithTools,
  nbdcopyTool,
  nbdinfoTool,
  nbdkitTool,
  opensslTool,
  pythonLibnbdTool,
  qemuImgTool,
  qemuIoTool,
  qemuNbdTool,
} from './required-tools.ts'
export type { RequiredTool } from './required-tools.ts'
export { ScriptedPeer, startScriptedServer } from './scripted-server.ts'
