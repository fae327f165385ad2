/** Maps: frozen ones, the loader that builds one from pages, what a set of roots reaches. */
import {
  type PageBatch,
  type PageFault,
  type RawFrozenMap,
  type RawMapCheck,
  type RawMapLoader,
  type RawPageSet,
  type RawReach,
  type RootRef,
} from './addon.ts'
import { call, settle } from './native-error.ts'

/** An immutable map. Any number of devices and calls may share one; there is nothing to release. */
export class FrozenMap {
  /** @internal */
  readonly raw: RawFrozenMap

  /** @internal */
  constructor(raw: RawFrozenMap) {
    this.raw = raw
  }

  /** The root as the catalog stores it, or null while pages of this map are not persisted. */
  root(): RootRef | null {
    return call(() => this.raw.root())
  }

  /** Aliases of every layer that the first `sizeBytes` refer to, ascending. */
  layers(sizeBytes: number): Uint32Array {
    return call(() => this.raw.layers(sizeBytes))
  }

  /** The same map with one run set to one owner (0: hole). This map stays as it is. */
  withRun(startSlot: number, slotCount: number, owner: number): FrozenMap {
    return call(() => new FrozenMap(this.raw.withRun(startSlot, slotCount, owner)))
  }

  /** Numbers (from `firstPageId` on) and encodes the pages that are not persisted, and compares with the durable map that this one replaces. */
  prepare(durable: FrozenMap, firstPageId: number): Promise<PageSet> {
    return settle(async () => new PageSet(await this.raw.prepare(durable.raw, firstPageId)))
  }

  /** What differs from `base` below `sizeBytes`: quads of start slot, slot count, owner here, owner there; ascending. */
  diff(base: FrozenMap, sizeBytes: number): Promise<Float64Array> {
    return settle(() => this.raw.diff(base.raw, sizeBytes))
  }

  /** Slots below `sizeBytes` by owner, holes left out. */
  ownerCounts(sizeBytes: number): Promise<{ owner: number; slotCount: number }[]> {
    return settle(() => this.raw.ownerCounts(sizeBytes))
  }

  /** Bytes of this map's nodes in memory, shared ones included. */
  memoryBytes(): number {
    return call(() => this.raw.memoryBytes())
  }
}

/** The pages that make a map durable. Letting go of one without `commit` is the abort. */
export class PageSet {
  readonly #raw: RawPageSet
  /** Pages to insert; their ids follow each other from the first id that was given. */
  readonly pageCount: number

  /** @internal */
  constructor(raw: RawPageSet) {
    this.#raw = raw
    this.pageCount = raw.pageCount()
  }

  /** The root to commit. */
  root(): RootRef {
    return call(() => this.#raw.root())
  }

  /** Ids of pages of the durable map that this one no longer has. */
  replaced(): Float64Array {
    return call(() => this.#raw.replaced())
  }

  /** Triples of start slot, slot count, old owner: space that may become free. */
  displaced(): Float64Array {
    return call(() => this.#raw.displaced())
  }

  /** Pages from `startIndex` on, at most `maxBytes` of bodies but at least one page; empty past the end. The bodies are copies. */
  pages(startIndex: number, maxBytes: number): PageBatch {
    return call(() => this.#raw.pages(startIndex, maxBytes))
  }

  /** The catalog has them. Once only; nothing else can be asked afterwards. */
  commit(): void {
    call(() => this.#raw.commit())
  }
}

/** Builds a map from the pages of a catalog: until `missing` is empty, fetch those pages and `supply` them; then `finish`. */
export class MapLoader {
  readonly #raw: RawMapLoader

  /** @internal */
  constructor(raw: RawMapLoader) {
    this.#raw = raw
  }

  /** Ids of pages that are needed next and that no open map has in memory. */
  missing(limit: number): Float64Array {
    return call(() => this.#raw.missing(limit))
  }

  /**
   * Gives pages, in any order.
   *
   * @throws PAGE_CORRUPT, FORMAT_VERSION naming the page
   */
  supply(ids: Float64Array, bodies: Uint8Array[]): void {
    call(() => this.#raw.supply(ids, bodies))
  }

  /**
   * The map; the loader is used up.
   *
   * @throws PAGE_MISSING if something is still missing
   */
  finish(): FrozenMap {
    return call(() => new FrozenMap(this.#raw.finish()))
  }
}

/**
 * What a set of roots refers to: slots by layer, and pages; each page is visited once however many roots share it. What takes
 * long is done off the event loop; calls one after the other.
 */
export class Reach {
  readonly #raw: RawReach

  /** @internal */
  constructor(raw: RawReach) {
    this.#raw = raw
  }

  /** Adds a root of a resource of this size. */
  addRoot(root: RootRef, sizeBytes: number): void {
    call(() => this.#raw.addRoot(root, sizeBytes))
  }

  /** Ids of pages to fetch next, at most `limit`; empty when done. */
  pending(limit: number): Float64Array {
    return call(() => this.#raw.pending(limit))
  }

  /** Gives pages that were pending. Errors as of `MapLoader.supply`. */
  supply(ids: Float64Array, bodies: Uint8Array[]): Promise<void> {
    return settle(() => this.#raw.supply(ids, bodies))
  }

  /** Aliases of layers that anything refers to, ascending. */
  layers(): Uint32Array {
    return call(() => this.#raw.layers())
  }

  /** Slots of one layer that are referred to: triples of start slot, slot count, layer; merged, ascending. */
  runs(layer: number): Promise<Float64Array> {
    return settle(() => this.#raw.runs(layer))
  }

  /** Slots of each of the layers that are referred to. */
  slotCounts(layers: Uint32Array): Promise<Float64Array> {
    return settle(() => this.#raw.slotCounts(layers))
  }

  /** For each id 1 if the page is reachable, else 0. */
  hasPages(ids: Float64Array): Uint8Array {
    return call(() => this.#raw.hasPages(ids))
  }

  /** Forgets everything and gives its memory back, which the collector would do at some time. */
  clear(): void {
    call(() => this.#raw.clear())
  }
}

/**
 * Walks over the pages of many roots and goes on after what is wrong: until `pending` is empty, fetch those pages and `supply`
 * them, undefined for one that is not there. What takes long is done off the event loop; calls one after the other.
 */
export class MapCheck {
  readonly #raw: RawMapCheck

  /** @internal */
  constructor(raw: RawMapCheck) {
    this.#raw = raw
  }

  /** Adds a root, over the whole address space. @throws PAGE_CORRUPT if the word is no root's */
  addRoot(root: RootRef): void {
    call(() => this.#raw.addRoot(root))
  }

  /** Ids of pages to fetch next, at most `limit`; empty when done. */
  pending(limit: number): Float64Array {
    return call(() => this.#raw.pending(limit))
  }

  /** Gives pages that were pending. What is wrong with them is told by `faults`. */
  supply(ids: Float64Array, bodies: (Uint8Array | undefined)[]): Promise<void> {
    return settle(() => this.#raw.supply(ids, bodies))
  }

  /** The first ten thousand pages that cannot be used. */
  faults(): PageFault[] {
    return call(() => this.#raw.faults())
  }

  /** How many pages cannot be used. */
  faultCount(): number {
    return call(() => this.#raw.faultCount())
  }

  /** Pairs: a page, and the watched page that it names. */
  pageReferrers(): Float64Array {
    return call(() => this.#raw.pageReferrers())
  }

  /** Pairs: a page, and the watched layer that it names. */
  layerReferrers(): Float64Array {
    return call(() => this.#raw.layerReferrers())
  }

  /** Aliases of layers that anything refers to, ascending. */
  layers(): Uint32Array {
    return call(() => this.#raw.layers())
  }

  /** For each layer the slot after the last one of it that is referred to; 0 if none is. */
  slotEnds(layers: Uint32Array): Promise<Float64Array> {
    return settle(() => this.#raw.slotEnds(layers))
  }

  /** Slots of one layer that are referred to: triples as of `Reach.runs`. */
  runs(layer: number): Promise<Float64Array> {
    return settle(() => this.#raw.runs(layer))
  }

  /** For each id 1 if the page is reached, else 0. What lies below damaged pages is not. */
  hasPages(ids: Float64Array): Uint8Array {
    return call(() => this.#raw.hasPages(ids))
  }

  /** Forgets everything and gives its memory back, which the collector would do at some time. */
  clear(): void {
    call(() => this.#raw.clear())
  }
}
