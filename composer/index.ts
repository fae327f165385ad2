export { openComposer, type Composer, type ComposerOptions, type ComposerStatus } from './composer.ts'
export type { Exports, ExportConnection, ExportEntry } from './exports.ts'
export type { AttachmentView, AttachOptions } from './attachments.ts'
export { nbdUnixUri } from './attachments.ts'
export type { VolumeService, CreateVolumeOptions } from './volume-service.ts'
export { defaultPoolName } from './volume-service.ts'
export type { SnapshotService, CreatedSnapshots } from './snapshot-service.ts'
export type { ImageService, ImportFileOptions, ImportStreamOptions, ImportUrlOptions, ExportOptions } from './image-service.ts'
export type {
  ContainerView,
  FileListing,
  FileRef,
  FileService,
  FileView,
  PlaceOptions,
  PutOptions,
  Reading,
  ReadOptions,
} from './file-service.ts'
export { listingLimitMax, type ListingOptions } from './file-listing.ts'
export type { FileReader, Stretch } from './file-reader.ts'
export { imageFormats, type ImageFormat } from './image-format.ts'
export type { CatalogService } from './catalog-service.ts'
export type { CheckParams, CheckResult, CheckService } from './check-job.ts'
export type { PoolAcceptView, PoolExportView, PoolImportView, PoolService, PoolState, PoolView } from './pool-service.ts'
export {
  activityIntervalMsMax,
  activityIntervalMsMin,
  type Activity,
  type ActivityMonitor,
  type JobActivity,
  type OperationActivity,
  type PoolActivity,
  type VolumeActivity,
  type VolumeTotals,
} from './activity.ts'
export type { Jobs } from './jobs.ts'
export { JobInterrupted, type JobView } from './job-kind.ts'
export type { MovePhase, Moves } from './move-job.ts'
export type { MoveService, StartedMove } from './move-service.ts'
export type { ProjectScope, Resolver } from './resolve.ts'
export { pageLimitMax, type Page, type PageOptions } from './resource-pages.ts'
export type { NamePolicy } from './service-context.ts'
export type { ImageView, MoveView, PoolsRead, ResourceUsage, ResourceView, SnapshotView, VolumeView } from './views.ts'
export { checkTakeOver } from './take-over.ts'
export type { ServeTemporaryNbd, TemporaryExport, TemporaryNbd } from './temporary-nbd.ts'
export { sandboxGroupId, sandboxUserId } from './convert-sandbox.ts'
