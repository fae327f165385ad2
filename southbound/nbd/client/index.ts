export { connect, info, list } from './connect.ts'
export type { NbdConnectOptions, NbdInfo, NbdReachOptions } from './connect.ts'
export type { NbdBlockSizes, NbdExportFlags, NbdExportInfo } from './export-info.ts'
export type { NbdListedExport, NbdMetaContext } from './haggling.ts'
export { defaultConnectionLimits, NbdConnection } from './nbd-connection.ts'
export type { NbdConnectionLimits, NbdReply, NbdRequest } from './nbd-connection.ts'
export { NbdError, NbdOptionError, NbdReplyError } from './nbd-error.ts'
export type { NbdErrorCode } from './nbd-error.ts'
export { formatNbdUri, parseNbdUri } from './nbd-target.ts'
export type { NbdAddress, NbdTarget, ResolvedTarget } from './nbd-target.ts'
export * as protocol from './protocol.ts'
export { connectRaw, RawNbdConnection } from './raw-connection.ts'
export type { RawGreeting } from './raw-connection.ts'
export { connectWithRetry, RetryingNbdConnection } from './retrying-connection.ts'
export type { NbdRetryOptions } from './retrying-connection.ts'
export type { NbdExtent } from './structured-reply.ts'
export {
  encodeCountedString,
  encodeExtendedRequest,
  encodeInfoRequest,
  encodeMetaContextRequest,
  encodeOption,
  encodeRequest,
} from './wire.ts'
export type { OptionReply, ReplyHeader, RequestHeader } from './wire.ts'
