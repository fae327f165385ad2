/** What must exist, what may exist, and what each thing may contain: the oracle of the crash tests. */
import type { ResourceKind } from '@atoll/core'
import type { PossibleContent } from './possible-content.ts'

export interface ModelResource {
  readonly name: string
  readonly kind: ResourceKind
  /** Any one of these, as a whole: an operation that replaces the content is under way while there are two. */
  contents: PossibleContent[]
  /** An operation that makes or deletes it is under way: it may be there or not. */
  uncertain: boolean
  /** Volumes: whether it is open. */
  open: boolean
  /** Snapshots: the volume's name. */
  readonly volumeName: string | null
}

export class Model {
  readonly resources = new Map<string, ModelResource>()
  /** Of these exactly one is there: one takes the place of another. */
  exactlyOneOf: readonly string[] = []

  get(name: string): ModelResource {
    const resource = this.resources.get(name)
    if (resource === undefined) throw new Error(`the model has no ${name}`)
    return resource
  }

  of(kind: ResourceKind): ModelResource[] {
    return [...this.resources.values()].filter((resource) => resource.kind === kind && !resource.uncertain)
  }

  /** The content of something that no operation is replacing. */
  content(name: string): PossibleContent {
    const [content] = this.get(name).contents
    if (content === undefined) throw new Error(`the model has no content of ${name}`)
    return content
  }

  add(resource: ModelResource): ModelResource {
    this.resources.set(resource.name, resource)
    return resource
  }
}
