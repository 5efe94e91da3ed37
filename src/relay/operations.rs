//! What can be changed over HTTP, by the parts that can do it.
//!
//! Owns nothing but the way from a request to the part that carries it out.

use std::sync::Arc;

use crate::admin::{FenceWish, OperationFuture, Operations, RatesWish};
use crate::config::RateLimit;
use crate::downstream::{LinkRates, Links};
use crate::relay::reload::Reloader;
use crate::upstream::FenceSwitch;

/// The operations of a relay.
pub(super) struct RelayOperations {
    pub(super) fence: FenceSwitch,
    pub(super) links: Arc<Links>,
    pub(super) reloader: Arc<Reloader>,
}

impl Operations for RelayOperations {
    fn set_fence(&self, wish: FenceWish) -> OperationFuture<'_> {
        Box::pin(async move {
            let outcome = match wish {
                FenceWish::Fence => self.fence.fence().await,
                FenceWish::Unfence => self.fence.unfence().await,
            };
            let told = outcome.map_err(|error| error.to_string())?;
            serde_json::to_value(told).map_err(|error| error.to_string())
        })
    }

    fn set_rates(&self, wish: RatesWish) -> OperationFuture<'_> {
        Box::pin(async move {
            let LinkRates { link_rate_max, links_rate_max } = self.links.rates();
            let rates = LinkRates {
                link_rate_max: wish.link_rate_max.map_or(link_rate_max, RateLimit::bytes),
                links_rate_max: wish.links_rate_max.map_or(links_rate_max, RateLimit::bytes),
            };
            self.links.set_rates(rates);
            tracing::info!(?rates, "rates of compressed links changed");
            serde_json::to_value(self.links.status()).map_err(|error| error.to_string())
        })
    }

    fn reload(&self) -> OperationFuture<'_> {
        Box::pin(async move {
            let status = self.reloader.reload().await?;
            serde_json::to_value(status).map_err(|error| error.to_string())
        })
    }
}
