/** Bounds of a negotiation: what a client can make us keep, read or wait for before it has named an export (I8). */
export interface NegotiationLimits {
  /** The whole negotiation, from the greeting to the first request. */
  readonly handshakeTimeoutMs: number
  /** Longest data of an option that is looked at; longer is ERR_TOO_BIG. */
  readonly optionDataBytesMax: number
  /** Longest data of an option that is read at all, to stay in step; beyond, the connection is closed. */
  readonly optionDataSkippedBytesMax: number
  /** Options of one negotiation. */
  readonly optionCountMax: number
}

export const defaultNegotiationLimits: NegotiationLimits = {
  handshakeTimeoutMs: 10_000,
  optionDataBytesMax: 64 * 1024,
  optionDataSkippedBytesMax: 1024 * 1024,
  optionCountMax: 1024,
}
